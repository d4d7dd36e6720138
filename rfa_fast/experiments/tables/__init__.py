"""The paper's Tables I–XIV and Figures 5 and 6, each a configuration that a command runs.

From the outside in: `catalogue` says what each table compares; `pairs` and `rows` what with what;
`paper_figures` what the paper found; `plan` which rows that makes and `budget` how long they take;
`runner` computes them; `aggregate` makes means, intervals, gaps and ranks of them; `outputs` writes.
"""
