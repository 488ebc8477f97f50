"""Speculative decoding with an MTP head: paged cache, batched loop, draft-length planner."""

from mtp_ext.decode.decoder import MAX_DRAFT_LEN as MAX_DRAFT_LEN
from mtp_ext.decode.decoder import Decoder as Decoder
from mtp_ext.decode.kv_cache import OutOfPages as OutOfPages
from mtp_ext.decode.kv_cache import PageAllocator as PageAllocator
from mtp_ext.decode.kv_cache import PagedKVCache as PagedKVCache
from mtp_ext.decode.metrics import Metrics as Metrics
from mtp_ext.decode.planner import DraftPlanner as DraftPlanner
from mtp_ext.decode.planner import measure_step_seconds as measure_step_seconds
from mtp_ext.decode.planner import plan_draft_len as plan_draft_len
from mtp_ext.decode.request import Request as Request
from mtp_ext.decode.request import SamplingParams as SamplingParams
