"""How a question is judged: experiments, claims, effects, verdicts, statistics. Imports runs."""
