"""How fast xprnn is here, beside whatever peers are installed: `python -m xprnn bench`, and what benchmarks/ stands on.

problem   one row of the grid: arrays that are the same for everyone
ours, article, peers   who can run it
timing, machine   medians of interleaved rounds; what they were measured on
worker, measure   a process for each number of threads, and who starts it
streams   one step at a time
tables, short   the report, and the user's command
"""
