"""Runs modules of rdma-core's own tests, as they are, and prints one line per test.

    run.py SUITE MODULE... [--dev NAME] [--pci-dev NAME]

SUITE is the directory that holds `tests`. Each line is `RESULT`, outcome, test and reason, separated by tabs.
"""

import importlib
import os
import sys
import unittest


class Lines(unittest.TestResult):
    """Says each outcome at once, so that a crash shows which test it was."""

    def say(self, outcome, test, reason=""):
        reason = " ".join(str(reason).split())[:200]
        sys.stdout.write(f"RESULT\t{outcome}\t{test.id()}\t{reason}\n")
        sys.stdout.flush()

    def startTest(self, test):
        super().startTest(test)
        self.say("started", test)

    def addSuccess(self, test):
        self.say("passed", test)

    def addSkip(self, test, reason):
        self.say("skipped", test, reason)

    def addError(self, test, err):
        super().addError(test, err)
        self.say("error", test, err[1])

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.say("failed", test, err[1])


def main():
    suite = sys.argv.pop(1)
    sys.path[:0] = [suite, os.path.join(suite, "tests")]
    modules = []
    while len(sys.argv) > 1 and not sys.argv[1].startswith("--"):
        modules.append(sys.argv.pop(1))
    parser = importlib.import_module("args_parser").parser
    parser.parse_args()
    loader, result = unittest.TestLoader(), Lines()
    for module in modules:
        loader.loadTestsFromName(f"tests.{module}").run(result)


main()
