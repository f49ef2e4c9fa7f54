"""The parts of `flexivid sweep`: arms, rivals, sampling, scoring, results and the page."""
