"""Accepted tree slots moved down, in ascending order."""

from torch import Tensor

from mtp_ext.reference.kv_append import as_nhd, find_slot


def kv_compact(
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    block_table: Tensor,
    cache_lens: Tensor,
    accept_index: Tensor,
    accept_lens: Tensor,
    *,
    layout: str = "NHD",
) -> None:
    for cache in (*k_caches, *v_caches):
        cache = as_nhd(cache, layout)
        num_pages, page_size = cache.shape[:2]
        for b in range(block_table.shape[0]):
            length = max(int(cache_lens[b]), 0)
            last = -1
            for j in range(min(int(accept_lens[b]), accept_index.shape[1])):
                index = int(accept_index[b, j])
                # A strictly increasing list of indices has index >= j: slots only move down.
                if index <= last or index < j:
                    continue
                last = index
                source = find_slot(block_table, b, length + index, page_size, num_pages)
                target = find_slot(block_table, b, length + j, page_size, num_pages)
                if source is not None and target is not None:
                    cache[target] = cache[source].clone()
