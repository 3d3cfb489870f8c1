"""Prints the size of the library's core packages.

  python benchmarks/code_size.py [--files]

For each package that takes part in a training step, it counts the nodes of
Python's syntax trees and the lines of code, without docstrings, comments and
blank lines. The number of nodes per line measures how dense the code is.
"""

import argparse
import ast
from pathlib import Path

ROOMS = ('core', 'directions', 'perturb', 'transforms', 'variants')
LEFT_OUT = ('sharding.py',)  # core/sharding.py is about meshes.
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def measure(path: Path) -> tuple[int, int]:
  """Returns the numbers of syntax nodes and of lines of code of a file."""
  text = path.read_text()
  tree = ast.parse(text)
  documentation = set()
  for node in ast.walk(tree):
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
      docstring = node.body[0]
      documentation.update(range(docstring.lineno, docstring.end_lineno + 1))
  lines = [
      line for number, line in enumerate(text.splitlines(), 1)
      if line.strip() and not line.strip().startswith('#')
      and number not in documentation]
  return sum(1 for _ in ast.walk(tree)), len(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--files', action='store_true', help='list each file too')
  show_files = parser.parse_args().files
  package = Path(__file__).parent.parent / 'mezo_jax'
  total_nodes = total_lines = 0
  print(f'{"":<40} {"nodes":>7} {"lines":>6} {"nodes a line":>13}')
  for room in ROOMS:
    room_nodes = room_lines = 0
    for path in sorted((package / room).glob('*.py')):
      if path.name in LEFT_OUT:
        continue
      nodes, lines = measure(path)
      room_nodes += nodes
      room_lines += lines
      if show_files:
        _show(f'  {path.relative_to(package)}', nodes, lines)
    _show(room, room_nodes, room_lines)
    total_nodes += room_nodes
    total_lines += room_lines
  _show('all', total_nodes, total_lines)


def _show(name: str, nodes: int, lines: int) -> None:
  print(f'{name:<40} {nodes:>7} {lines:>6} {nodes / max(lines, 1):>13.1f}')


if __name__ == '__main__':
  main()
