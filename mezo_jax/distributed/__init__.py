"""Runs training on several processes, and on replicas that exchange steps.

JAX connects the processes, moves the arrays and notices when a process dies.
This package turns that into a message and an exit status, and checks that all
processes have the same code, config and rows. It also lets replicas, which JAX
does not connect, divide the directions of a step among them (experimental).
"""

__all__ = ()
