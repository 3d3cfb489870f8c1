"""A run of several processes: how they join, and how replicas exchange steps.

JAX connects the processes and moves the arrays. This room checks that they run
the same thing and notices when one of them ends.
"""

__all__ = ()
