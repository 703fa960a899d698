"""AGENTS.md and CONTRIBUTING.md: what those who change the code are told holds."""

from __future__ import annotations

import re

from tests.docs import claims
from tests.test_readme import TEST


def test_what_agents_are_told_is_short_and_true() -> None:
    text = claims.text_of("AGENTS.md")

    claims.check("AGENTS.md", {})
    assert len(text.splitlines()) <= 30


def test_what_contributors_are_told_is_true() -> None:
    (versions,) = re.findall(r"for version in (.*); do", claims.text_of(".ci/run"))
    facts = {"from {} to {}": lambda: (versions.split()[0], versions.split()[-1])}

    claims.check("CONTRIBUTING.md", facts)


def test_the_checks_of_the_page_are_those_of_ci() -> None:
    install, checks = re.findall(r"```sh\n(.*?)```", claims.text_of("CONTRIBUTING.md"), re.DOTALL)
    ci = claims.text_of(".ci/run").replace('"', "").replace(" --check", "")

    *quick, rules, everything = checks.splitlines()

    assert install.rpartition(" && ")[0] == TEST.rpartition(" && ")[0]
    assert all(f"$bin/{check}\n" in ci for check in quick)
    assert rules == f"{everything} tests/test_architecture.py" and everything in ci
