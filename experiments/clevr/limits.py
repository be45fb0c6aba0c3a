"""What limits the model in the box: its image encoder, its energy, or the descent?

    python experiments/clevr/limits.py [--model FILE] [--num 500]

Decodes validation scenes in four ways: as it is shipped, from one initial set, from the true set,
and from the latents of the true set in place of the image's. Puts a table of average precision into
README.md, and the numbers into limits.json beside this file.
"""

import argparse
import dataclasses
import json
from datetime import date
from pathlib import Path

import jax
import numpy as np

import msdspn_jax as ms
from msdspn_jax import _markdown
from msdspn_jax._memory import keep_freed_memory
from msdspn_jax.bench.layer import device_name
from msdspn_jax.clevr.metrics import AP_NAMES, AP_THRESHOLDS
from msdspn_jax.tasks.clevr.data import load_split
from msdspn_jax.tasks.clevr.scores import score
from msdspn_jax.tasks.evaluation import over_split
from msdspn_jax.tasks.summary import put_into
from msdspn_jax.trained.weights import box_model_path, load_model

HERE = Path(__file__).parent
# Scenes of which neither training, nor the scores of the model, nor its calibration know.
SEED = 20_002


def ways_of(model):
    """By name: ``(images, objects) -> (sets, their energy for the image)``, jitted."""
    network = model.predictor.network(train=False)
    variables = {"params": model.variables["params"], **model.variables.get("state", {})}
    of_decoder = {"params": model.variables["params"]["decoder"]}
    energy, params = network.decoder.energy(model.variables)
    inner = model.config.resolved_inner()
    steps, starts = inner.steps_at_evaluation, inner.eval_num_starts or 1

    def encoded(images):
        return network.apply(variables, images, method=lambda module, x: module.encoder(x))

    def decoded(latent, **options):
        return network.decoder.apply(of_decoder, latent, num_steps=steps, **options)

    def context(latent, sets):
        start = np.broadcast_to(of_decoder["params"]["initial_set"], sets.shape)
        return ms.Context(latent, start)

    def begun_at(sets, latent):
        settings = inner.options() | {"num_steps": steps}
        return ms.minimise(energy, params, context(latent, sets), sets, **settings).sets

    def way(decode):
        def run(images, objects):
            latent = encoded(images)
            sets = decode(latent, objects)
            return sets, energy(params, sets, context(latent, sets))

        return jax.jit(run)

    return {
        f"the image, {starts} initial sets": way(lambda z, y: decoded(z, num_starts=starts).sets),
        "the image, one initial set": way(lambda z, y: decoded(z).sets),
        "the image, begun at the true set": way(lambda z, y: begun_at(y, z)),
        "the true set's own latents": way(lambda z, y: decoded(energy.encode(params, y)).sets),
        "(the true set itself)": way(lambda z, y: y),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=box_model_path(), help="a weights file")
    parser.add_argument("--num", type=int, default=500, help="scenes")
    options = parser.parse_args()
    keep_freed_memory()
    model = load_model(options.model)
    config = dataclasses.replace(model.config, data_seed=SEED, val_size=options.num, cache_dir=None)
    images, objects = (np.asarray(x) for x in load_split(config, "val"))
    objects = objects.astype(np.float32)
    found = {"step": model.step, "num": options.num, "device": device_name()}
    found |= {"date": date.today().isoformat(), "ways": {}}
    lines = []
    for name, way in ways_of(model).items():
        sets, energies = over_split(
            lambda index, way=way: way(images[index], objects[index]), len(images), batch_size=100
        )
        scores = {k: float(v) for k, v in score(sets, objects).items()}
        found["ways"][name] = scores | {"energy": float(np.mean(energies))}
        cells = [f"{100 * scores[f'ap_{t:g}']:.1f}" for t in AP_THRESHOLDS]
        lines.append([name, *cells, f"{np.mean(energies):.3f}"])
        print(*lines[-1], sep="  ", flush=True)
    (HERE / "limits.json").write_text(json.dumps(found, indent=1) + "\n")
    text = _markdown.table(["decoded from", *AP_NAMES, "energy"], lines)
    put_into(HERE / "README.md", text, "limits.py")


if __name__ == "__main__":
    main()
