"""Where KV lives below the accelerator: pages of 256 tokens, found by prefix key.

`index` and `policy` decide and are pure; `contract` says what a tier does; `host` and `disk` do it.
"""
