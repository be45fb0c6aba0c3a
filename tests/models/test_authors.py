"""Weights of the authors' PyTorch models: taken over, they compute what theirs do."""

import json
from pathlib import Path

import chex
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_weights import numbers, weights

import msdspn_jax as ms
from msdspn_jax.models.authors import from_pytorch
from msdspn_jax.models.resnet import ResNet

FILE = Path(__file__).parent.parent / "golden" / "image_model.npz"
TOLERANCE = 1e-9


def golden():
    with np.load(FILE) as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("config_json")))


def theirs(config):
    """What their checkpoints hold: a prefix, the energy a second time, and counts of batches."""
    state = weights(config["shapes"])
    state |= {f"dspn.{name}": x for name, x in state.items() if name.startswith("inner_obj.")}
    state["input_to_z.end.0.num_batches_tracked"] = np.array(5)
    return {f"net.{name}": x for name, x in state.items()}


def found_by_name(tree):
    """A tree of gradients, by the authors' names and in their layout."""
    encoder, energy = tree["encoder"], tree["decoder"]["energy_encoder"]

    def channels_first(x):  # Latents of 4 positions.
        return x.reshape(*x.shape[:-1], 4, -1).swapaxes(-1, -2).reshape(x.shape)

    return {
        "input_to_z.layers.0.weight": encoder["stem"]["kernel"].transpose(3, 2, 0, 1),
        "input_to_z.layers.5.0.downsample.1.weight": encoder["stage2_block1"]["shortcut_norm"][
            "scale"
        ],
        "input_to_z.end.0.weight": encoder["end_norm"]["scale"],
        "input_to_z.end.1.bias": encoder["end"]["bias"],
        "inner_obj.encoder.mlp.2.weight": channels_first(energy["output"]["kernel"]).T,
        "inner_obj.encoder.pool.weight": channels_first(energy["pool_weight"]),
    }


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_image_model_computes_what_theirs_does(mode):
    with jax.enable_x64(True):
        arrays, config = golden()
        n, d = config["set_size"], config["set_dim"]
        model = ms.SetPredictor(
            encoder=ResNet(
                latent_dim=config["latent_dim"], train=mode == "train", dtype=jnp.float64
            ),
            decoder=ms.SetDecoder(n, d, config["hidden_dim"], inner=ms.Inner(max_grad_norm=10.0)),
        )
        variables = from_pytorch(theirs(config))
        side = config["size"]
        images = (numbers((2, side, side, 3), 7) + 1) / 2
        cotangent = numbers((2, n, d), 11)

        @jax.jit
        def run(params):
            found, stats = model.apply(
                variables | {"params": params}, images, mutable=["batch_stats"]
            )
            return jnp.sum(found.sets * cotangent), (found.sets, stats)

        grads, (sets, stats) = jax.grad(run, has_aux=True)(variables["params"])
        chex.assert_trees_all_close(sets, arrays[f"{mode}/output_set"], atol=TOLERANCE, rtol=0)
        found = found_by_name(grads)
        wanted = {
            k.split("/grad/")[1]: x for k, x in arrays.items() if k.startswith(f"{mode}/grad")
        }
        assert found.keys() == wanted.keys()
        chex.assert_trees_all_close(found, wanted, atol=TOLERANCE, rtol=1e-7)
        if mode == "train":
            after = stats["batch_stats"]["encoder"]["stem_norm"]["mean"]
            expected = arrays["train/after/input_to_z.layers.1.running_mean"]
            chex.assert_trees_all_close(after, expected, atol=TOLERANCE, rtol=0)


def as_theirs(part):
    """Golden arrays of a set encoder, by the names of a state dict."""
    names = {
        "mlp.0.weight": part["hidden_kernel"].T,
        "mlp.0.bias": part["hidden_bias"],
        "mlp.2.weight": part["output_kernel"].T,
        "mlp.2.bias": part["output_bias"],
    }
    return names | ({"pool.weight": part["pool_weight"]} if "pool_weight" in part else {})


FILES = ["idspn_random_sets", "idspn_pairwise_fspool", "idspn_sum_pool", "dspn_numbering_simplex"]


@pytest.mark.parametrize("name", FILES)
def test_set_models(name):
    arrays = golden_files.load(f"{name}.npz")
    relational = golden_files.config(arrays)["pool"] == "pairwise_fspool"
    tree = golden_files.nested(arrays, "param/")
    parts = {"input_to_z.": "input_encoder", "inner_obj.encoder.": "energy_encoder"}
    state = {f"{k}{n}": x for k, part in parts.items() for n, x in as_theirs(tree[part]).items()}
    if "initial_set" in tree:
        state["dspn._set_0"] = tree["initial_set"][None]
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, golden_files.variables(tree, relational))
    chex.assert_trees_all_equal(from_pytorch(state, relational=relational), expected)


def test_what_is_no_such_model_is_refused():
    with pytest.raises(ValueError, match=r"ends in inner_obj.*got fc\.weight"):
        from_pytorch({"fc.weight": np.ones(3)})
    _, config = golden()
    state = weights(config["shapes"])
    del state["input_to_z.layers.5.0.bn2.running_var"]
    with pytest.raises(ValueError, match=r"expected input_to_z\.layers\.5\.0\.bn2\.running_var"):
        from_pytorch(state)
    state = weights(config["shapes"]) | {"head.weight": np.ones(3)}
    with pytest.raises(ValueError, match=r"got also head\.weight"):
        from_pytorch(state)
