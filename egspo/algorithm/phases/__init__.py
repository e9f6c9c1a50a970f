"""The five phases of an iteration, each with what it reports: rollout, rewards, selection, replay,
update."""
