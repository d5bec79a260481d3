"""Hyper-parameter studies: many trials per row of a sweep file, and the COMET paper's report of them.

How a trial is trained is not known here, see ``TrialRunner``.
"""

from dist_moe.sweeps.runner import DEFAULT_RUNNER, Report, TrialResult, TrialRunner

__all__ = ["DEFAULT_RUNNER", "Report", "TrialResult", "TrialRunner"]
