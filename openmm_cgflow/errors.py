"""Errors that a user can cause. The command line prints their message and exits with code 2."""

__all__ = ["CGFlowError", "ReplicaError"]


class CGFlowError(Exception):
    """A problem the user can mend: the message says what is wrong, where, and what to do."""


class ReplicaError(CGFlowError):
    """Too many replicas of the fast atoms were quarantined in one call of an engine."""
