"""scripted_judge.py - a judge that knows: an endpoint on this machine that scores by the demo's own checks.

5 where a response honours the context, 1 where it does not: what RLAIF could learn from a faultless judge.

    python results/scripted_judge.py --port 8099 &
    python train.py --method rlaif --judge scripted --judge-url http://127.0.0.1:8099/v1 --out runs/rlaif
"""

import argparse
import http.server
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checks import honours  # noqa: E402
from judge import quote  # noqa: E402
from run import read_jsonl  # noqa: E402

CHECKS = {quote(row["context"]): row["check"] for _, row in read_jsonl(ROOT / "assets/demo/contexts.jsonl")}


def score(question: str) -> int:
    """The score of a question as judge.reward asks it: the preference first, the response last. 1 where the
    preference is not the demo's: training asks one such question first, to see whether anyone answers."""
    preference, _, rest = question.removeprefix("User preference: ").partition("\nUser: ")
    _, _, response = rest.partition("\nAssistant: ")
    return 5 if preference in CHECKS and honours(CHECKS[preference], response) else 1


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = str(score(request["messages"][-1]["content"]))
        message = dict(role="assistant", content=reply)
        body = json.dumps(dict(choices=[dict(index=0, message=message, finish_reason="stop")])).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Quietly."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8099)
    http.server.ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler).serve_forever()
