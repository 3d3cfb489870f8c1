"""Optional packages, and the sentence that says how to install them."""

import importlib.util


class MissingExtraError(ModuleNotFoundError):
  """Says in one sentence which packages are missing and how to install them."""


def require(needed_by: str, *packages: str, extra: str = 'train') -> None:
  """Raises in one sentence if packages of an extra are not installed.

  Args:
    needed_by: Name of the module that imports the packages.
    *packages: Names under which they are imported.
    extra: Name of the extra of this distribution that brings them.

  Raises:
    MissingExtraError: If a package is missing.
  """
  missing = [p for p in packages if importlib.util.find_spec(p) is None]
  if missing:
    raise MissingExtraError(
        f'{needed_by} needs {", ".join(missing)}; to install what is missing, '
        f"run: pip install 'mezo_jax[{extra}]'", name=missing[0])
