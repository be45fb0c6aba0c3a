"""Makes image_model.npz with the authors' code (github.com/davzha/multiset-equivariance).

    PYTHONPATH=THEIR_CHECKOUT:tests python tests/golden/make_image_model.py

Needs torch and torchvision. Their DSPN needs `higher` too, which is not used here.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from image_weights import numbers, weights

SIZE, LATENT, HIDDEN, N, D, STEPS = 128, 32, 16, 10, 19, 20
GRADS = [
    "input_to_z.layers.0.weight",
    "input_to_z.layers.5.0.downsample.1.weight",
    "input_to_z.end.0.weight",
    "input_to_z.end.1.bias",
    "inner_obj.encoder.mlp.2.weight",
    "inner_obj.encoder.pool.weight",
]
AFTER = [
    "input_to_z.layers.1.running_mean",
    "input_to_z.layers.1.running_var",
    "input_to_z.end.0.running_var",
]


def main():
    sys.modules.setdefault("higher", types.ModuleType("higher"))
    import models

    torch.set_default_dtype(torch.float64)
    energy = {"d_in": D, "d_hid": HIDDEN, "d_latent": LATENT, "set_size": N, "pool": "fs"}
    inner = {"momentum": 0.9, "lr": 1.0, "iters": STEPS, "grad_clip": 10.0, "projection": None}
    model = models.DSPNImageModel(
        input_enc_kwargs={"d_latent": LATENT, "image_size": SIZE},
        inner_obj_kwargs=energy | {"objective_type": "mse_regularized"},
        dspn_kwargs=inner | {"learn_init_set": True, "set_dim": D, "set_size": N, "implicit": True},
    )
    shapes = {
        name: list(x.shape)
        for name, x in model.state_dict().items()
        if "num_batches" not in name and "dspn.inner_obj" not in name
    }
    state = {name: torch.tensor(x) for name, x in weights(shapes).items()}
    images = torch.tensor((numbers((2, SIZE, SIZE, 3), 7) + 1) / 2).permute(0, 3, 1, 2).contiguous()
    cotangent = torch.tensor(numbers((2, N, D), 11))
    config = {"size": SIZE, "latent_dim": LATENT, "hidden_dim": HIDDEN, "set_size": N, "set_dim": D}
    config |= {"num_steps": STEPS, "momentum": 0.9, "learning_rate": 1.0, "max_grad_norm": 10.0}
    arrays = {"config_json": json.dumps(config | {"shapes": shapes})}
    for mode in ("eval", "train"):
        getattr(model, mode)()
        model.zero_grad()
        model.load_state_dict(state, strict=False)
        arrays[f"{mode}/latent"] = model.input_to_z(images).detach().numpy()
        model.load_state_dict(state, strict=False)  # That was a step of the statistics.
        sets, _ = model(images)
        (sets * cotangent).sum().backward()
        arrays[f"{mode}/output_set"] = sets.detach().numpy()
        params = dict(model.named_parameters())
        arrays |= {f"{mode}/grad/{name}": params[name].grad.numpy().copy() for name in GRADS}
    after = model.state_dict()
    arrays |= {f"train/after/{name}": after[name].numpy() for name in AFTER}
    np.savez_compressed(Path(__file__).parent / "image_model.npz", **arrays)


if __name__ == "__main__":
    main()
