"""A component that is tried again goes on with its run."""

from __future__ import annotations

import pytest

from launch.components import train


@pytest.mark.parametrize(("max_retries", "goes_on"), [(0, False), (3, True)])
def test_a_job_with_retries_resumes_by_itself(max_retries: int, goes_on: bool) -> None:
    (role,) = train("seed=1", config="a.yaml", run_dir="runs/a", max_retries=max_retries).roles
    assert role.max_retries == max_retries
    assert ("--auto-resume" in " ".join(role.args)) == goes_on
    assert "--auto-resume" not in " ".join(train(resume="runs/a", max_retries=max_retries).roles[0].args)
