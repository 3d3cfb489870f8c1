"""Which axes hold the same elements before and after a reshape."""


def of(old, new) -> list[tuple[list[int], list[int]]]:
  """Runs of old and new axes that hold the same elements, each the shortest."""
  groups, a, b = [], 0, 0
  while a < len(old) or b < len(new):
    was, will = [], []
    size_was = size_will = 1
    if a < len(old):
      was, size_was, a = [a], old[a], a + 1
    if b < len(new) and (size_was > 1 or not was):
      will, size_will, b = [b], new[b], b + 1
    while size_was != size_will:
      if size_was < size_will:
        was, size_was, a = [*was, a], size_was * old[a], a + 1
      else:
        will, size_will, b = [*will, b], size_will * new[b], b + 1
    groups.append((was, will))
  return groups
