"""Derivatives of the energy of frames with respect to the slow and the fast coordinates (paper eqs. 15-17)."""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_cgflow.coordinates.all_atom import AllAtomMap
from openmm_cgflow.engines.engine import Frames

__all__ = ["comoving_gradients", "frame_gradients"]


def frame_gradients(all_atom: AllAtomMap, z: Tensor, frames: Frames[Tensor], beta: float, estimator: str) -> Tensor:
    """d(beta U)/dz of every frame, shape (B, n_frames, n_features).

    ``comoving`` holds the fast atoms' internal coordinates and contracts the forces on all atoms; ``cartesian``, the
    paper's, holds their positions and contracts the forces on the slow atoms alone. Both average to the mean force.
    """
    if estimator == "comoving":
        return comoving_gradients(all_atom, z, frames, beta)[0]
    repeated = _repeated(z, frames)
    built = all_atom.coordinates.to_xyz(repeated)
    (gradient,) = torch.autograd.grad(built, repeated, _reduced(frames, beta)[..., list(all_atom.slow), :])
    return torch.where(frames.valid[:, None, None], gradient, 0.0)


def comoving_gradients(all_atom: AllAtomMap, z: Tensor, frames: Frames[Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """d(beta U)/dz and the force balance of the fast coordinates y, beta dU/dy - d ln J/dy, of every frame.

    J is the volume element of y. At every z, the balance averages to zero over the fast atoms.

    Returns:
        Shapes (B, n_frames, n_features) and (B, n_frames, 3 n_fast).
    """
    repeated, y = _repeated(z, frames), all_atom.read_fast(frames.xyz).requires_grad_()
    slow, fast = torch.autograd.grad(all_atom.build(repeated, y), (repeated, y), _reduced(frames, beta))
    (volume,) = torch.autograd.grad(all_atom.log_volume_fast(y).sum(), y)
    valid = frames.valid[:, None, None]
    return torch.where(valid, slow, 0.0), torch.where(valid, (fast - volume).flatten(2), 0.0)


def _repeated(z: Tensor, frames: Frames[Tensor]) -> Tensor:
    return z.detach()[:, None].expand(-1, frames.energy.shape[1], -1).clone().requires_grad_()


def _reduced(frames: Frames[Tensor], beta: float) -> Tensor:
    """d(beta U)/dx. Invalid replicas hold zeros that rebuild to nan: masked before anything is multiplied."""
    return torch.where(frames.valid[:, None, None, None], -beta * frames.forces, 0.0)
