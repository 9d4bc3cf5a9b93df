"""Settings of runs that are as short as they can be, for tests. Of two lines for one setting the later one holds."""

_COMMON = (
    "chains.n_replicas=16",
    "chains.n_pool_steps=50",
    "chains.n_workers=1",
    "chains.platform=Reference",
    "flow.n_layers=2",
    "flow.hidden_features=[16]",
    "samples.n_samples=24",
    "samples.n_equilibration=10",
    "training.checkpoint_interval=1000",
    "pmf.n_test=512",
    "pmf.polish_block=5",
)
_PMF = (
    *_COMMON,
    "pmf.n_updates=5",
    "pmf.final_updates=5",
    "pmf.flow_updates=2",
    "pmf.flow_batch_size=64",
    "pmf.polish_updates=10",
    "pmf.hidden_features=[16]",
    "stopping.max_polish_cycles=1",
)
_WITHOUT_SWITCHING = ("pmf.n_switched=0", "samples.n_verified=0")

# Three rounds, a step of switching, a block of updates of the PMF, two of the flow alone.
TINY = (
    *_PMF,
    "stopping.max_rounds=3",
    "pmf.n_switched=1",
    "stopping.free_energy_error=5",
    "samples.n_verified=2",
    "samples.n_switches=2",
)
# No switching, neither in the training nor after it, and one round more.
TINY_WITHOUT_SWITCHING = (*_PMF, *_WITHOUT_SWITCHING, "chains.n_pool_steps=20", "stopping.max_rounds=4")
# So many frames that their populations can be compared.
TINY_WITH_FRAMES = (
    *_PMF,
    *_WITHOUT_SWITCHING,
    "pmf.polish_updates=50",
    "stopping.max_rounds=2",
    "samples.n_samples=200",
)
# What `check` has to foresee: chains that relax, and rounds up to the limit of evaluations.
TINY_BUT_MANY_ROUNDS = (
    "chains.n_replicas=16",
    "chains.n_pool_steps=30",
    "chains.n_workers=1",
    "chains.platform=Reference",
    "chains.n_equilibration=20",
    "chains.n_frames=16",
    "chains.stride=3",
    "chains.n_relax=5",
    "flow.hidden_features=[16]",
    "pmf.n_updates=5",
    "pmf.final_updates=5",
    "pmf.flow_updates=4",
    "pmf.polish_updates=20",
    "pmf.n_test=512",
    "pmf.polish_block=5",
    "pmf.hidden_features=[16]",
    "stopping.max_polish_cycles=2",
    "stopping.max_rounds=100",
    "samples.n_samples=24",
    "samples.n_equilibration=10",
)
# A synthetic target costs nothing: more replicas and updates, so that its modes are found.
TINY_TARGET = (
    "chains.n_replicas=64",
    "chains.n_pool_steps=20",
    "chains.n_workers=1",
    "chains.platform=Reference",
    "chains.n_equilibration=5",
    "flow.n_layers=4",
    "flow.hidden_features=[16]",
    "pmf.n_updates=20",
    "pmf.final_updates=20",
    "pmf.flow_updates=5",
    "pmf.polish_updates=20",
    "pmf.n_test=512",
    "pmf.polish_block=5",
    "pmf.hidden_features=[16]",
    "pmf.n_switched=0",
    "stopping.max_rounds=4",
    "stopping.max_polish_cycles=1",
    "samples.n_samples=50",
    "samples.n_verified=2",
    "samples.n_switches=2",
)

_LADDER = ("training.method=reverse_kl", "tempering.start=600")
# The paper's own method, with as many stages as the adaptive schedule takes.
TINY_LADDER = (
    *_COMMON,
    *_LADDER,
    "tempering.schedule=adaptive",
    "training.n_steps_first=4",
    "training.n_steps=3",
    "training.n_steps_last=4",
)
# The joint density of slow and fast coordinates, down the same ladder.
TINY_JOINT = (*TINY_LADDER, "training.method=joint")
# Two stages of the paper's own method, on top of other settings.
TWO_STAGES = (
    *_LADDER,
    "tempering.schedule=linear",
    "tempering.n_stages=2",
    "training.n_steps_first=3",
    "training.n_steps=2",
    "training.n_steps_last=3",
)
# The joint density down the same two stages.
TWO_STAGES_JOINT = ("training.method=joint", *TWO_STAGES[1:])
