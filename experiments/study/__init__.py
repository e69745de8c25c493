"""How a question is judged: experiments, claims, effects, statistics. Imports runs."""
