"""Every setting, section by section, with what it means: the one place where settings are described."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from openmm_cgflow.units import Friction, Mass, Seconds, Temperature, Time

__all__ = [
    "ChainSettings",
    "CoordinatesSettings",
    "FlowSettings",
    "JointSettings",
    "PMFSettings",
    "PartitionSettings",
    "PotentialSettings",
    "SampleSettings",
    "Section",
    "StoppingSettings",
    "SystemSettings",
    "TargetSettings",
    "TemperingSettings",
    "TrainingSettings",
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TargetSettings(Section):
    """A synthetic system of the paper, with exact answers; see ``openmm_cgflow.paper.targets``."""

    name: Literal["double_well", "gaussian_mixture"]
    dimensions: int = Field(2, ge=1)
    """Of z and of y, of the mixture."""
    seed: int = Field(1, ge=0)
    """Of the mixture's means and matrix; the system is the same whatever the seed of the run."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class PotentialSettings(Section):
    """A machine-learned potential; see ``openmm_cgflow.molecule.potentials``."""

    python: str | None = Field(None, pattern=r"^[\w.]+:\w+$")
    """``module:factory``; what the factory returns is a torch module, positions (n_atoms, 3) in nm -> energy in
    kJ/mol. One that takes (n_replicas, n_atoms, 3) as well is called once for all replicas."""
    files: dict[str, Path] = {}
    """With python: keyword arguments of the factory; with openmmml: of ``openmmml.MLPotential``, such as modelPath."""
    torchscript: Path | None = None
    """Such a module, saved by torch.jit; evaluated by openmmtorch where that can be imported."""
    openmmml: str | None = None
    """A name that ``openmmml.MLPotential`` knows."""
    options: dict[str, bool | int | float | str] = {}
    """With python: more keyword arguments of the factory; with openmmml: of ``createSystem``, such as charge,
    multiplicity or modelIndex."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(value is not None for value in (self.python, self.torchscript, self.openmmml)) != 1:
            raise ValueError("give exactly one of python (module:factory), torchscript (a file) and openmmml (a name)")
        if self.files and self.torchscript is not None:
            raise ValueError("files are arguments of a python factory or of openmmml; torchscript is one file itself")
        if self.options and self.torchscript is not None:
            raise ValueError("options are arguments of a python factory or of openmmml; torchscript takes none")
        both = self.files.keys() & self.options.keys()
        if both:
            raise ValueError(f"{', '.join(sorted(both))}: in files and in options; give it once")
        return self


class SystemSettings(Section):
    """The all-atom model: one structure and descriptions of its energy, or a built-in target."""

    structure: Path | None = None
    """PDB, mmCIF, Amber inpcrd/rst7 or GROMACS gro file with the starting positions."""
    forcefield: list[str] = []
    """OpenMM force-field XML files, as in ``openmm.app.ForceField(...)``."""
    topology: Path | None = None
    """Amber prmtop, GROMACS top or CHARMM psf file."""
    parameters: list[Path] = []
    """CHARMM parameter files, with a psf topology."""
    system_xml: Path | None = None
    """A serialized ``openmm.System``; replaces the force field."""
    implicit_solvent: Literal["hct", "obc1", "obc2", "gbn", "gbn2"] | None = None
    """Implicit solvent for Amber, GROMACS and CHARMM topologies (with XML force fields, name its XML file)."""
    include_dir: Path | None = None
    """Where GROMACS include files live."""
    potential: PotentialSettings | None = None
    """A machine-learned potential: the whole energy, or added to what the other settings describe."""
    target: TargetSettings | None = None
    """A synthetic system with exact answers, instead of files."""

    @model_validator(mode="after")
    def _one_energy(self) -> Self:
        if self.target is not None:
            if any(value for name, value in self if name != "target"):
                raise ValueError("a target takes no files: leave out everything else in this section")
            return self
        if self.structure is None:
            raise ValueError("system.structure is required, but missing: the file with the starting positions")
        given = [bool(self.forcefield), self.topology is not None, self.system_xml is not None]
        if sum(given) > 1 or not (any(given) or self.potential):
            raise ValueError(
                "give exactly one of forcefield (XML names), topology (prmtop, top or psf) and system_xml, or a "
                "potential"
            )
        if self.implicit_solvent is not None and self.topology is None:
            raise ValueError("implicit_solvent goes with topology; with XML force fields add e.g. implicit/obc2.xml")
        return self


class PartitionSettings(Section):
    """Which atoms are slow."""

    slow: str | list[int] = "backbone"
    """``backbone``, ``heavy``, an MDTraj selection or a list of 0-based atom indices."""


class CoordinatesSettings(Section):
    """How the slow atoms are described."""

    kind: Literal["internal", "cartesian", "box"] = "internal"
    """``internal``: torsions, bonds and angles; ``cartesian``: the paper's, six coordinates fixed by three atoms;
    ``box``: the x of particles that no bonds connect, for synthetic targets."""
    half_edge: float = Field(10.0, gt=0)
    """Box only: half of its edge, nm. The model ends at its walls, where the density must have vanished."""
    reference_atoms: tuple[int, int, int] | None = None
    """Cartesian only: the atoms at the origin, on the x axis and in the xy plane (0-based, bonded in a row)."""
    peptide_bonds: Literal["keep", "sample"] = "keep"
    """``keep``: every amide bond stays cis or trans as in the input structure; ``sample``: both, as slow torsions, and
    the hydrogens on their nitrogens are slow as well."""
    bound: float = Field(6.0, gt=1.0)
    """Half-width of the spline interval of bounded coordinates, in units of their scale; for the joint density of a
    target, half of the box in thermal widths of the pseudo-particles until it is measured how far they get."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class FlowSettings(Section):
    """Sizes of the spline coupling flow."""

    n_layers: int = Field(8, ge=2)
    """Coupling layers of the torsions."""
    n_bounded_layers: int = Field(2, ge=2)
    """Coupling layers of the bounded coordinates given the torsions."""
    n_bins: int = Field(12, ge=2)
    hidden_features: list[PositiveInt] = [64, 64]


class ChainSettings(Section):
    """Frozen-slow Langevin dynamics of the fast atoms."""

    estimator: Literal["comoving", "cartesian"] = "comoving"
    adaptive: bool = True
    """With training.method pmf: n_replicas is the largest, n_equilibration and n_frames the smallest number; what the
    chains show decides."""
    n_replicas: int = Field(1024, ge=1)
    """Replicas, that is flow samples, of one training step."""
    timestep: Time = Field(0.002, gt=0)
    """Good for the default hydrogen_mass: the fast atoms have no constraints."""
    friction: Friction = Field(50.0, gt=0)
    hydrogen_mass: Mass = Field(4.0, gt=0)
    """Mass of fast hydrogens; configurational averages do not depend on masses."""
    n_pool: int = Field(256, ge=1)
    """Replicas of the first pool of fast atoms."""
    n_pool_steps: int = Field(500, ge=0)
    """Steps that equilibrate it."""
    n_relax: int = Field(5, ge=0)
    """Capped descent steps; they act on forces above force_cap only."""
    force_cap: float = Field(10000.0, gt=0)
    """kJ/mol/nm, far above thermal forces."""
    n_equilibration: int = Field(40, ge=0)
    """Steps after the warm start: mean forces are biased for the first 50 to 100 fs."""
    n_frames: int = Field(8, ge=1)
    stride: int = Field(4, ge=1)
    """Steps between two frames."""
    max_invalid: float = Field(0.2, ge=0, le=1)
    """Fraction of quarantined replicas above which the run stops."""
    keep_chirality: bool = True
    """Quarantine replicas whose handedness differs from the input structure's."""
    platform: str | None = None
    """OpenMM platform; otherwise OPENMM_DEFAULT_PLATFORM, otherwise a timing probe."""
    precision: Literal["single", "mixed", "double"] = "mixed"
    engine: Literal["auto", "contexts", "lattice"] = "auto"
    n_workers: int = Field(0, ge=0)
    """Worker processes of the contexts engine; 0 = one per core."""

    @property
    def chain_evaluations(self) -> int:
        """Energy evaluations of one chain."""
        return self.n_relax + self.n_equilibration + self.n_frames * (self.stride + 1)


class PMFSettings(Section):
    """The potential of mean force that is learned on the fly, and the training of the flow on it."""

    hidden_features: list[PositiveInt] = [96, 96]
    n_members: int = Field(4, ge=2)
    """Ensemble members; their spread is the error."""
    learning_rate: float = Field(5e-3, gt=0)
    n_updates: int = Field(150, ge=1)
    """Updates of the PMF in each round."""
    response_updates: int = Field(100, ge=1)
    """Updates of the fast atoms' response to the slow ones in each round; it takes noise out of the mean forces."""
    final_updates: int = Field(2000, ge=1)
    """Updates of the last fit, which starts anew on all mean forces."""
    n_switched: int = Field(8, ge=0)
    """Conformations whose free energies are measured by switching, for the last fit, to within
    stopping.free_energy_error; 0 = none."""
    explore_height: float = Field(5.0, gt=0)
    """How far above the model three fifths of the mean forces are measured, kT of free energy."""
    flow_learning_rate: float = Field(5e-3, gt=0)
    flow_batch_size: int = Field(512, ge=2)
    flow_updates: int = Field(25, ge=1)
    """Updates of the flow in each round."""
    polish_updates: int = Field(600, ge=1)
    """Updates of the flow after the last round; repeated until they no longer help."""
    polish_at_target: float = Field(0.9, ge=0, le=1)
    """Fraction of them that train the target temperature; the others are for hotter ones, which matter for synthetic
    systems."""


class StoppingSettings(Section):
    """When rounds of mean forces end: all three criteria, or either limit."""

    held_out: float = Field(1.5, gt=0)
    """Error of predicted mean forces before they are fitted, over their noise or, where that is larger, over what the
    fit aims at, 0.1 kT and 5 % of the force."""
    free_energy_error: float = Field(0.05, gt=0)
    """kT, of free-energy differences by switching. Rounds end once the free energy of every torsion state above 0.5 %
    is known to twice as much and moved by no more in three rounds; without switching, to this."""
    ess: float = Field(0.98, gt=0, lt=1)
    """Relative effective sample size of the flow in the end; nine tenths of it end the rounds."""
    max_evaluations: float = Field(3e6, gt=0)
    """Energy evaluations of the training, three fifths for rounds and the rest for switching; the check and samples
    come on top."""
    max_rounds: int = Field(100, ge=1)
    max_polish_cycles: int = Field(3, ge=1)


class TemperingSettings(Section):
    """The ladder of temperatures from easy to the target; for ``training.method`` ``reverse_kl`` and ``joint``."""

    schedule: Literal["adaptive", "linear", "list"] = "adaptive"
    start: Temperature = Field(1200.0, gt=0)
    n_stages: int = Field(10, ge=1)
    """Stages of the linear schedule, equally spaced in beta."""
    temperatures: list[Temperature] = []
    """Stages of the list schedule, from hot to the target."""
    criterion: Literal["ess", "kl"] = "ess"
    """Adaptive: what bounds a step; ``kl`` is the paper's second version."""
    min_ess: float = Field(0.7, gt=0, lt=1)
    """Adaptive: relative effective sample size between two stages."""
    max_kl: float = Field(0.2, gt=0)
    """Adaptive with criterion kl: increase of KL(model || target) from one stage to the next, over its value or, where
    that is larger, over one nat."""


class TrainingSettings(Section):
    """The method, and the settings of the reverse KL by Adam."""

    method: Literal["pmf", "reverse_kl", "joint"] = "pmf"
    """``pmf``: learn the potential of mean force and train the flow on it; ``reverse_kl``: the paper's first version;
    ``joint``: its second, the density of all atoms without chains of the fast ones."""
    learning_rate: float = Field(1e-3, gt=0)
    n_steps_first: int = Field(200, ge=1)
    n_steps: int = Field(60, ge=1)
    n_steps_last: int = Field(400, ge=1)
    clip_factor: float = Field(5.0, gt=0)
    """Gradients are clipped at this multiple of the running median norm, single mean forces at that of their batch."""
    skip_factor: float = Field(10.0, gt=0)
    """Updates with gradients above this multiple are skipped."""
    median_window: int = Field(50, ge=1)
    checkpoint_interval: Seconds = Field(60.0, gt=0)
    """Wall time between two checkpoints."""


class SampleSettings(Section):
    """The samples that end a training."""

    n_samples: int = Field(10000, ge=0)
    acceptance: float = Field(1 / 3, gt=0, le=1)
    """Fraction of the flow's draws that become samples, those with large importance weights rather than others, so
    that samples have equal weights but for draws of more than about three times the mean; 1 = all as drawn."""
    n_equilibration: int = Field(20, ge=0)
    """Steps of every frame's own chain after its warm start."""
    n_verified: int = Field(8, ge=0)
    """Conformations whose free energies are checked by switching between them; 0 = no check."""
    n_switches: int = Field(16, ge=2)
    """Switches to each of them and back."""
    plots: bool = True


class JointSettings(Section):
    """The density of all atoms at once; for ``training.method: joint``."""

    map: Literal["fixed", "linear"] = "fixed"
    """``fixed``: the partition's; ``linear``: a learned right-stochastic matrix, for synthetic targets."""
    mixing: float = Field(0.0, ge=0, lt=1)
    """Linear map only: how much of the mean of all particles each pseudo-particle starts with."""
    n_layers: int = Field(0, ge=0)
    """Coupling layers of the fast coordinates given the slow ones; 0 = a Gaussian."""
    n_replays: int = Field(2, ge=0)
    """Updates on samples of earlier batches after each update on new ones; they cost no energy evaluations."""
