"""Checks that optional packages are installed."""

import importlib.util


class MissingExtraError(ModuleNotFoundError):
  """Reports which packages are missing and how to install them."""


def require(needed_by: str, *packages: str, extra: str = 'train') -> None:
  """Raises an error if optional packages are not installed.

  Args:
    needed_by: Name of the module that imports the packages.
    *packages: Import names of the packages.
    extra: Name of the group of optional dependencies that installs them, as in
      ``pip install 'mezo_jax[train]'``. Defaults to 'train'.

  Raises:
    MissingExtraError: If a package is missing.
  """
  missing = [p for p in packages if importlib.util.find_spec(p) is None]
  if missing:
    raise MissingExtraError(
        f'{needed_by} needs {", ".join(missing)}; to install, run: '
        f"pip install 'mezo_jax[{extra}]'", name=missing[0])
