"""Settings of runs that are as short as they can be, for tests."""

COMMON = (
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
# Three rounds, a step of switching, a block of updates of the PMF, two of the flow alone.
TINY = (
    *COMMON,
    "pmf.n_updates=5",
    "pmf.final_updates=5",
    "pmf.flow_updates=2",
    "pmf.flow_batch_size=64",
    "pmf.polish_updates=10",
    "pmf.hidden_features=[16]",
    "stopping.max_rounds=3",
    "stopping.max_polish_cycles=1",
    "pmf.n_switched=1",
    "stopping.free_energy_error=5",
    "samples.n_verified=2",
    "samples.n_switches=2",
)
TINY_LADDER = (
    *COMMON,
    "training.method=reverse_kl",
    "tempering.schedule=adaptive",
    "tempering.start=600",
    "training.n_steps_first=4",
    "training.n_steps=3",
    "training.n_steps_last=4",
)
