"""The leaderboard's graph: a table of arms and endpoints, each step a published command line, run by snakemake."""
