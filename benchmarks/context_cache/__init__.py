"""Questions to a long document, whose KV comes from one cache tier after the other."""
