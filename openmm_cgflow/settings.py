"""Every setting, section by section: the one place where settings are described.

The docstrings become the comments of the file that ``openmm-cgflow init`` writes, the page of settings in the
documentation and a part of error messages: a first line that can be read alone, a blank line, then details.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from openmm_cgflow.units import ForcePerMole, Friction, Length, Mass, Seconds, Temperature, Thermal, Time

__all__ = [
    "ChainSettings",
    "CoordinatesSettings",
    "FlowSettings",
    "Free",
    "JointSettings",
    "Mark",
    "PMFSettings",
    "PartitionSettings",
    "PotentialSettings",
    "SampleSettings",
    "Section",
    "Shown",
    "StoppingSettings",
    "SystemSettings",
    "TargetSettings",
    "TemperingSettings",
    "TrainingSettings",
]


class Mark(Enum):
    """What else is to be known of a setting."""

    SHOWN = "in the file that init writes"
    FREE = "may differ when a run is continued, as nothing that is learned depends on it"


_T = TypeVar("_T")
Shown = Annotated[_T, Mark.SHOWN]
Free = Annotated[_T, Mark.FREE]


class Section(BaseModel):
    """Base of all sections. Their docstrings are for users, as those of their settings are."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class TargetSettings(Section):
    """A synthetic system of the paper, with exact answers."""

    name: Literal["double_well", "gaussian_mixture"]
    """The synthetic system: two particles in a double well, or a mixture of three Gaussians."""
    dimensions: int = Field(2, ge=1)
    """Number of slow coordinates of the Gaussian mixture, and of its fast ones.

    The double well has one of each, whatever is given here."""
    seed: int = Field(1, ge=0)
    """Seed of the mixture's means and of the matrix that mixes its coordinates.

    It belongs to the system: the seed of the run does not change it."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class PotentialSettings(Section):
    """A machine-learned potential: exactly one of python, torchscript and openmmml."""

    python: str | None = Field(None, pattern=r"^[\w.]+:\w+$", examples=["my_module:factory"])
    """Python function that makes the potential, written as module:function.

    It is called with files and options as keyword arguments and returns a torch module, which takes positions
    (n_atoms, 3) in nm to an energy in kJ/mol. A module that takes (n_replicas, n_atoms, 3) as well is called once for
    all replicas. The Python module must be installed, or its folder be in PYTHONPATH."""
    torchscript: Path | None = Field(None, examples=["model.pt"])
    """TorchScript file with such a module, saved by torch.jit.

    It is evaluated by openmmtorch where that can be imported, otherwise by openmm.PythonForce."""
    openmmml: str | None = Field(None, examples=["mace"])
    """Name of a potential that openmmml.MLPotential knows, such as mace or aimnet2."""
    files: dict[str, Path] = {}
    """Files that the potential needs, by the name of the argument they are given as.

    With python they go to the function, with openmmml to openmmml.MLPotential, such as modelPath."""
    options: dict[str, bool | int | float | str] = {}
    """Plain values that the potential needs, by the name of the argument they are given as.

    With python they go to the function, with openmmml to its createSystem, such as charge, multiplicity or
    modelIndex."""

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
    """The molecule and its all-atom energy; paths are relative to the configuration file.

    A structure with exactly one of forcefield, topology and system_xml, or with a potential, alone or added to one of
    these; or a target alone. The section may be missing only where a MolecularSystem is handed over in Python."""

    structure: Path | None = Field(None, examples=["molecule.pdb"])
    """Starting positions: a PDB, mmCIF, inpcrd, rst7, gro or crd file.

    All hydrogens must be there. The structure also sets the handedness, and peptide bonds that are kept."""
    forcefield: list[str] = Field([], examples=[["amber14-all.xml", "implicit/gbn2.xml"]])
    """OpenMM force-field XML files, as in openmm.app.ForceField.

    Names that OpenMM knows, or files beside the configuration."""
    topology: Path | None = Field(None, examples=["molecule.prmtop"])
    """Topology with force-field parameters: Amber prmtop, GROMACS top or CHARMM psf."""
    parameters: list[Path] = Field([], examples=[["par_all36_prot.prm"]])
    """CHARMM parameter files, which a psf topology needs."""
    system_xml: Path | None = Field(None, examples=["system.xml"])
    """Serialized openmm.System, instead of a force field."""
    implicit_solvent: Literal["hct", "obc1", "obc2", "gbn", "gbn2"] | None = Field(None, examples=["obc2"])
    """Generalized Born model that is added to an Amber, GROMACS or CHARMM topology.

    With XML force fields, name the model's XML file among these instead, such as implicit/obc2.xml."""
    include_dir: Path | None = Field(None, examples=["/usr/share/gromacs/top"])
    """Folder of the GROMACS include files."""
    potential: PotentialSettings | None = None
    target: TargetSettings | None = None

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
    """Which atoms are slow; all others are fast."""

    slow: Shown[str | list[int]] = "backbone"
    """Slow atoms, whose free energy is learned: one connected set without rings.

    backbone: N CA C, and the carbons and nitrogens of the caps; heavy: all but hydrogens, with those of hydroxyl and
    thiol groups; or an MDTraj selection such as "name N CA C", or a list of 0-based atom indices."""


class CoordinatesSettings(Section):
    """How the slow atoms are described."""

    kind: Shown[Literal["internal", "cartesian", "box"]] = "internal"
    """Kind of the slow coordinates.

    internal: torsions, bonds and angles; cartesian: the paper's own, only with training.method reverse_kl; box: the x
    of particles without bonds, for the paper's synthetic targets."""
    peptide_bonds: Shown[Literal["keep", "sample"]] = "keep"
    """Whether amide bonds turn between cis and trans.

    keep: each stays as in the input structure; sample: they are slow torsions, and the hydrogens on their nitrogens
    are slow as well."""
    bound: float = Field(6.0, gt=1)
    """Half-width of the intervals of bond lengths and angles, in thermal widths of each.

    The model ends there. For the joint density of a target it is half of the box, in thermal widths of the
    pseudo-particles, until it is measured how far they get."""
    half_edge: Length = Field(10.0, gt=0)
    """Half of the box's edge, with kind box only.

    The model ends at its walls, where the density must have vanished."""
    reference_atoms: tuple[int, int, int] | None = Field(None, examples=[[4, 6, 8]])
    """Atoms at the origin, on the x axis and in the xy plane, with kind cartesian only.

    0-based indices of three slow atoms that are bonded in a row; chosen where this is left out."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class FlowSettings(Section):
    """Size of the normalizing flow that draws the slow coordinates."""

    n_layers: int = Field(8, ge=2)
    """Number of spline coupling layers of the torsions."""
    n_bounded_layers: int = Field(2, ge=2)
    """Number of spline coupling layers of bond lengths and angles, given the torsions."""
    n_bins: int = Field(12, ge=2)
    """Number of bins of every spline: more of them can follow sharper features of the density."""
    hidden_features: list[PositiveInt] = [64, 64]
    """Width of every hidden layer of the networks in the coupling layers."""


class ChainSettings(Section):
    """Langevin dynamics of the fast atoms at frozen slow ones, which measures mean forces."""

    estimator: Literal["comoving", "cartesian"] = "comoving"
    """How the forces of a chain become a mean force of the slow coordinates.

    comoving: fast atoms move along with the slow ones, which takes most of the noise away; cartesian: the paper's own,
    unbiased too, but needs tens to thousands of times as many samples."""
    adaptive: bool = True
    """Whether the training chooses the numbers of replicas, steps and frames.

    Then n_replicas is the largest number, and n_equilibration and n_frames the smallest ones. With training.method
    reverse_kl they are as given."""
    n_replicas: Shown[int] = Field(1024, ge=1)
    """Replicas in a step, each at slow coordinates of its own; small molecules need fewer.

    With adaptive, the first rounds have a quarter of them."""
    timestep: Shown[Time] = Field(0.002, gt=0)
    """Time step; right for the default hydrogen_mass, as the fast atoms have no constraints."""
    friction: Shown[Friction] = Field(50.0, gt=0)
    """Friction of the Langevin dynamics; averages over conformations do not depend on it."""
    hydrogen_mass: Shown[Mass] = Field(4.0, gt=0)
    """Mass of fast hydrogens; averages over conformations do not depend on it."""
    n_pool: int = Field(256, ge=1)
    """Replicas that equilibrate the fast atoms before the first training step.

    Later chains start where earlier ones with similar slow coordinates ended."""
    n_pool_steps: Shown[int] = Field(500, ge=0)
    """Time steps that equilibrate the fast atoms before the first training step."""
    n_relax: int = Field(5, ge=0)
    """Steps of descent before every chain, which act on forces above force_cap only.

    They undo clashes of a new start, and leave thermal structures as they are."""
    force_cap: ForcePerMole = Field(10000.0, gt=0)
    """Force component above which the descent before a chain acts, far above thermal forces."""
    n_equilibration: Shown[int] = Field(40, ge=0)
    """Time steps of a chain before its frames.

    Mean forces are biased for the first 50 to 100 fs after a warm start."""
    n_frames: Shown[int] = Field(8, ge=1)
    """Frames of a chain, over which forces are averaged.

    At least 2 with training.method pmf: their spread is the noise."""
    stride: Shown[int] = Field(4, ge=1)
    """Time steps between two frames."""
    max_invalid: float = Field(0.2, ge=0, le=1)
    """Fraction of failed replicas above which the run stops with an error.

    Replicas fail that diverge or, with keep_chirality, turn a stereocentre inside out."""
    keep_chirality: bool = True
    """Whether to discard replicas whose stereocentres differ in handedness from the input structure."""
    platform: Shown[str | None] = Field(None, examples=["CUDA"])
    """OpenMM platform, such as CUDA or CPU; left out, the fastest in a short probe.

    The environment variable OPENMM_DEFAULT_PLATFORM comes before the probe."""
    precision: Literal["single", "mixed", "double"] = "mixed"
    """Arithmetic precision of the OpenMM platform, where it has a choice, as GPU platforms do."""
    engine: Literal["auto", "contexts", "lattice"] = "auto"
    """How replicas are run.

    contexts: one after the other in worker processes; lattice: all at once, as copies in one System; auto: lattice on
    a GPU or with a potential that takes all replicas in one call, contexts otherwise."""
    n_workers: Shown[Free[int]] = Field(0, ge=0)
    """Worker processes on the CPU; 0 = one per core.

    Results do not depend on their number."""

    @property
    def chain_evaluations(self) -> int:
        """Energy evaluations of one chain."""
        return self.n_relax + self.n_equilibration + self.n_frames * (self.stride + 1)


class TrainingSettings(Section):
    """The training method, and settings of the paper's methods, reverse_kl and joint."""

    method: Shown[Literal["pmf", "reverse_kl", "joint"]] = "pmf"
    """How the model is trained.

    pmf: learn the potential of mean force and train the flow on it (sections pmf and stopping); reverse_kl: the
    paper's first version; joint: its second, the density of all atoms without chains of the fast ones (sections
    tempering and joint, and the rest of this one)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of Adam in reverse_kl and joint; it falls to a twentieth over the last stage."""
    n_steps_first: int = Field(200, ge=1)
    """Updates in the first and hottest stage of reverse_kl and joint."""
    n_steps: int = Field(60, ge=1)
    """Updates in every stage of reverse_kl and joint between the first and the last."""
    n_steps_last: int = Field(400, ge=1)
    """Updates in the last stage of reverse_kl and joint, at the target temperature."""
    clip_factor: float = Field(5.0, gt=0)
    """Multiple of the running median norm at which gradients are clipped, in reverse_kl and joint.

    Single mean forces, and in joint forces of single structures, are clipped at this multiple of their batch's
    median."""
    skip_factor: float = Field(10.0, gt=0)
    """Multiple of the running median norm of the gradient above which an update of reverse_kl and joint is skipped."""
    median_window: int = Field(50, ge=1)
    """Number of updates that the running median of gradient norms is taken over, in reverse_kl and joint."""
    checkpoint_interval: Free[Seconds] = Field(60.0, gt=0)
    """Wall time between two checkpoints, from which a run can be continued; for all methods."""


class PMFSettings(Section):
    """The potential of mean force (PMF), learned round by round, and the flow's training on it."""

    hidden_features: list[PositiveInt] = [96, 96]
    """Width of every hidden layer of the PMF's networks, and of the network of the fast atoms' response."""
    n_members: Shown[int] = Field(4, ge=2)
    """Networks that learn the same PMF; their spread is its error."""
    learning_rate: float = Field(5e-3, gt=0)
    """Learning rate of the PMF's fit."""
    n_updates: int = Field(150, ge=1)
    """Updates of the PMF in each round."""
    response_updates: int = Field(100, ge=1)
    """Updates in each round of the response, how the fast atoms follow the slow ones.

    Knowing it takes most of the noise out of the mean forces."""
    final_updates: int = Field(2000, ge=1)
    """Updates of the PMF's last fit, which starts anew on all mean forces, and of the response's before it."""
    n_switched: int = Field(8, ge=0)
    """Conformations whose free energies are measured by switching, to hold the last fit; 0 = none.

    They are measured to stopping.free_energy_error."""
    explore_height: Shown[Thermal] = Field(5.0, gt=0)
    """Free energy above the model's samples at which most mean forces are measured.

    Barriers higher than this are explored little. Three fifths of every round go there, the others lower."""
    flow_learning_rate: float = Field(5e-3, gt=0)
    """Learning rate of the flow."""
    flow_batch_size: int = Field(512, ge=2)
    """Samples in one update of the flow; they cost no energy evaluations."""
    flow_updates: int = Field(25, ge=1)
    """Updates of the flow in each round."""
    polish_updates: int = Field(600, ge=1)
    """Updates of the flow in a cycle after the last fit; cycles repeat until they no longer help."""
    polish_block: int = Field(50, ge=1)
    """Updates of the flow in one step of a cycle, that is in one row of metrics.csv."""
    n_test: int = Field(16384, ge=2)
    """Samples of the flow behind every effective sample size and population in metrics.csv."""
    n_probe: int = Field(512, ge=2)
    """Samples of the flow at each barrier scale of the search for the one to explore with."""
    polish_at_target: float = Field(0.9, ge=0, le=1)
    """Fraction of the flow's updates after the last fit that train the target temperature.

    The others are for hotter ones, which matter for synthetic systems."""


class StoppingSettings(Section):
    """When rounds of mean forces end: the first three settings all hold, or a limit is reached.

    For training.method pmf; the other methods make a given number of steps."""

    free_energy_error: Shown[Thermal] = Field(0.05, gt=0)
    """Wanted error of free-energy differences between conformations, measured by switching.

    Rounds end once the free energies of all torsion states above 0.5 % are known to twice as much, and moved by no
    more in three rounds; where nothing is switched, to this much."""
    held_out: Shown[float] = Field(1.5, gt=0)
    """Error of predicted mean forces, before they are fitted, over their noise.

    Where it is larger, what the fit aims at stands in for the noise, 0.1 kT and 5 % of the force."""
    ess: Shown[float] = Field(0.98, gt=0, lt=1)
    """Relative effective sample size of the flow in the end, 1 = its samples are the PMF's.

    Nine tenths of it end the rounds."""
    max_evaluations: Shown[float] = Field(3e6, gt=0)
    """Energy evaluations of the training, at most.

    Three fifths are for rounds, the others for switching. The final check and samples come on top."""
    max_rounds: Shown[int] = Field(100, ge=1)
    """Rounds of mean forces, at most."""
    max_polish_cycles: int = Field(3, ge=1)
    """Cycles of pmf.polish_updates updates of the flow after the last fit, at most."""


class TemperingSettings(Section):
    """The ladder of temperatures from easy to the target; for training.method reverse_kl and joint."""

    schedule: Literal["adaptive", "linear", "list"] = "adaptive"
    """How the temperatures of the stages are chosen.

    adaptive: each as far below the last as criterion allows; linear: n_stages, equally spaced in beta = 1/RT; list:
    those in temperatures."""
    start: Temperature = Field(1200.0, gt=0)
    """Temperature of the first stage, with the schedules adaptive and linear."""
    n_stages: int = Field(10, ge=1)
    """Number of stages, with the linear schedule."""
    temperatures: list[Temperature] = Field([], examples=[["1200 K", "600 K", "300 K"]])
    """Temperatures of the stages, from hot to the target, with the list schedule."""
    criterion: Literal["ess", "kl"] = "ess"
    """What bounds a step of the adaptive schedule.

    ess: min_ess, the effective sample size between stages; kl: max_kl, the paper's second version."""
    min_ess: float = Field(0.7, gt=0, lt=1)
    """Smallest relative effective sample size of one stage's samples at the next, with criterion ess."""
    max_kl: float = Field(0.2, gt=0)
    """Largest relative increase of KL(model || target) from one stage to the next, with criterion kl.

    Relative to its value or, where that is larger, to one nat."""


class JointSettings(Section):
    """The density of all atoms at once; for training.method joint."""

    map: Literal["fixed", "linear"] = "fixed"
    """How slow and fast coordinates are made of the atoms.

    fixed: as the partition says; linear: a learned right-stochastic matrix, for synthetic targets."""
    mixing: float = Field(0.0, ge=0, lt=1)
    """Share of the mean of all particles that each pseudo-particle starts with, with map linear only."""
    n_layers: int = Field(0, ge=0)
    """Number of coupling layers of the fast coordinates given the slow ones; 0 = a Gaussian."""
    n_replays: int = Field(2, ge=0)
    """Updates on samples of earlier batches after each update on new ones; they cost no energy evaluations."""


class SampleSettings(Section):
    """The samples that end a training, and its check."""

    n_samples: Shown[int] = Field(10000, ge=0)
    """All-atom structures that are written at the end; 0 = none."""
    acceptance: float = Field(1 / 3, gt=0, le=1)
    """Fraction of the flow's draws that become samples, mostly those with large importance weights; 1 = all.

    The smaller it is, the more alike are the weights of the samples: at a third they are equal but for draws of more
    than about three times the mean weight. After reverse_kl there are no weights, and all draws become samples."""
    n_equilibration: Shown[int] = Field(20, ge=0)
    """Time steps of every sample's own chain before it is written."""
    n_verified: Shown[int] = Field(8, ge=0)
    """Conformations whose free energies are checked by switching at the end; 0 = no check."""
    n_switches: int = Field(16, ge=2)
    """Switches to each of the checked conformations, and as many back."""
    plots: Shown[bool] = True
    """Whether to draw plots of the training and of the samples."""
