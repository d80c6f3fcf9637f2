"""From answers to scores: the engine under the evaluators, judging, likelihoods, benchmarks, the code sandbox."""
