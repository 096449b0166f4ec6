"""Requests in, tokens out: blocks, scheduler, runner, sampler, speculation. No I/O and no text."""
