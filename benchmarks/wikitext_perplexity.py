"""WikiText-2 perplexity of the default model (window 2048) beside the published 17.38 of the unquantized one.

FILE is the raw test split (`wiki.test.raw`, maybe .gz). The default model is a 4-bit build of the published one, so its
figure is expected to be higher; equal tokenization is what makes the two comparable.
"""

from __future__ import annotations

from common import parser, write

from powertrain.measure import record
from powertrain.measure.evaluate import perplexity

PUBLISHED = {"ppl": 17.38, "what": "SmolLM2-135M-Instruct in float32, window 2048", "source": "Samsung/TICO PR 761"}


def main() -> None:
    arguments = parser(__doc__, "wikitext_perplexity.json")
    arguments.add_argument("file")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--window", type=int, default=2048)
    arguments.add_argument("--num-tokens", type=int, help="about this many, evenly spread; all if not given")
    given = arguments.parse_args()

    def show(what: str, done: float, total: float | None) -> None:
        print(f"\r{what} {done:.0f}/{total or 0:.0f}", end="", flush=True)

    found = perplexity(given.model, given.file, window=given.window, num_tokens=given.num_tokens, progress=show)
    print(
        f"\nperplexity {found.ppl:.3f} {found.interval or ''} over {found.num_tokens:,} tokens; published {PUBLISHED}"
    )
    content = found.to_dict()
    content["settings"] = {**content["settings"], "data": "WikiText-2 raw test"}
    made = record.new_record("wikitext_perplexity", git=given.git, model=given.model, published=PUBLISHED)
    write(given.json, {**made, **{k: v for k, v in content.items() if k not in ("schema", "kind")}})


if __name__ == "__main__":
    main()
