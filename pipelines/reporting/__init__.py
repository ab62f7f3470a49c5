"""The report: from the files of a run to estimates, tables, plots and one page.

``gather`` reads a run, ``scores`` and ``estimates`` turn answers into numbers, ``tables`` and the modules that
fill them (``results_tables``, ``published``, ``costs``) say what is shown, ``plots`` draws. The stage itself is
``pipelines.report``.
"""
