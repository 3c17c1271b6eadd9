"""How fast xprnn is here, beside whatever peers are installed: `python -m xprnn bench`, and what benchmarks/ stands on.

problem   one row of the grid: arrays that are the same for everyone
ours, article, peers, loop   who can run it
machine, timing   what it is measured on; medians and ratios
seat, players   a process for each contender, in turns
contenders, measure   who runs a row and whether they agree; a task from beginning to end
streams   one step at a time
tables, short   the report, and the user's command
"""
