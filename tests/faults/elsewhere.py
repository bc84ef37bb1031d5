"""Proofs that stand elsewhere, because they belong to what they are about."""

EXACT = "exact (E)"
ELSEWHERE: dict[str, tuple[tuple[str, str, str], ...]] = {}
