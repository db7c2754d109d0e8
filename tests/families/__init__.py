"""Tiny models of many families, each scored and trained by this package and by plain loops."""
