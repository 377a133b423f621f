"""FlowCoro's server in one process, where the other contender has two. Run by ../http.py; harness.py says what it does."""

import cases_flowcoro
import harness

if __name__ == "__main__":
    harness.main(dict(processes=lambda: cases_flowcoro.processes(None)), cases_flowcoro.flowcoro_http.__version__)
