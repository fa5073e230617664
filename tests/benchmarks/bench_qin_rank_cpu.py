"""QIN on one thread, forward only, 512 candidates of one user, published configuration: `model.ranking`, as it serves.

`qin_rank_cpu` is rows a second beside the published form. `qin_rank_sgemm_share` is the rate of the products that are
left, beside the rate at which this machine multiplies two large float32 matrices.
"""

from __future__ import annotations

from harness import one_thread, report, seconds

one_thread()

import torch  # noqa: E402 - one thread first
from worlds import microlens  # noqa: E402

from models.qin import QIN, QINConfig  # noqa: E402
from models.schema import history_rows  # noqa: E402
from tests.models.published import qin as published_qin  # noqa: E402

CANDIDATES, SQUARE = 512, 2048


def main() -> None:
    data = microlens(CANDIDATES)
    schema, catalog, batch = data.schema, data.catalog, data.batch(slice(0, CANDIDATES))
    config = QINConfig()
    model = QIN(config, schema).eval()
    state, ranking = model.state_dict(), model.ranking(catalog)
    hist_1L = history_rows(data.click_log, batch.start_B[:1], batch.end_B[:1], schema.history_length)
    a, b = torch.randn(2, SQUARE, SQUARE)

    def rank() -> torch.Tensor:
        return ranking(batch.fields_BF, batch.item_B, hist_1L[0])

    @torch.inference_mode()
    def published() -> torch.Tensor:
        hist_BL = hist_1L.expand(CANDIDATES, -1)
        return published_qin(state, config, schema, batch, catalog, hist_BL, training=False)

    torch.testing.assert_close(rank(), published(), rtol=1e-3, atol=1e-3)
    own, peer, sgemm = seconds(rank, published, lambda: a @ b, rounds=9)
    report("qin_rank_cpu", CANDIDATES / own, "rows/s", "published form", CANDIDATES / peer)
    item_width = len(model.items) * config.dim
    width = len(model.fields.tables) * config.dim + 2 * item_width
    layers = config.layers * 2 * width * width
    attention = 2 * 2 * schema.history_length * item_width
    flop = CANDIDATES * (layers + attention) + 2 * 2 * schema.history_length * item_width**2
    report("qin_rank_sgemm_share", flop / own / 1e9, "GFLOP/s", "sgemm", 2 * SQUARE**3 / sgemm / 1e9)


if __name__ == "__main__":
    main()
