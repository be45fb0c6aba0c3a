import clevr_archive
import pytest

from msdspn_jax.clevr.tfds import convert_to_tfds


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    return clevr_archive.make_archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="session")
def tfds_folder(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    convert_to_tfds(archive, folder)
    return folder
