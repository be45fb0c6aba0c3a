"""What checks the annotations of the package while its tests run (see `conftest`)."""

from beartype import BeartypeConf, beartype

# An int may stand for a float, as everywhere in Python.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
