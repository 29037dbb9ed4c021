"""titok_fast: TiTok (arXiv 2406.07550) and its MaskGIT generator, weight-compatible and fast."""
