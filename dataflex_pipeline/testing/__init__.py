"""Contracts: test suites that the tests of an extension inherit."""
