"""What the perception terms do for the result: arms, fixed protocol, resumable runs, report.

    python -m bench.evidence protocol     # what is compared, on which seeds, by which numbers
    python -m bench.evidence run --stage development --jobs 2
    python -m bench.evidence choose       # each arm's setting, from its development runs
    python -m bench.evidence run --stage test --jobs 2
    python -m bench.evidence report       # docs/evidence.md and its pictures

All of it runs from the repository's root, with `.` and `kernels` on PYTHONPATH or the project
installed. docs/evidence.md says how to read what comes out.
"""
