"""SentencePiece models as files of the `tokenizers` package."""

import tokenizers

_SPACE = "▁"
# Texts on which both must agree: spaces, lines, marks that a normalisation would
# change, scripts, bytes that no piece has, and code.
_TEXTS = (
    "Once more,  with\t\tspaces \r\n\n  and lines\n",
    " led by one" + 43 * " " + "and many",
    "followed by two  ",
    " ",
    "",
    "naïve café, e\u0301 \u1e9b\u0323 ﬁ Ａ ① \u00a0\u200b",
    "中文字符，測試。日本語 한국어 العربية",
    "🙂👩‍👧 \x00\x01",
    "def f(x):\n    return {'a': [1, 22, 333], \"b\": x**2}  # it's <done>\n",
)


def to_byte_pair(processor):
    """The `tokenizers.Tokenizer` that gives the ids of a SentencePiece model.

    A byte-pair model of SentencePiece holds no merges: a piece's score is the rank at
    which it arises, and each way to cut it into two pieces is a merge of that rank.

    Args:
        processor: a `sentencepiece.SentencePieceProcessor`.

    Returns:
        A `tokenizers.Tokenizer`, or None where it would give other ids: for a model
        that is not of byte pairs, or that normalises its text.
    """
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    special = [i for i in vocabulary.values() if _is_special(processor, i)]
    merges = []
    for i, piece in enumerate(pieces):
        if i in special or processor.is_byte(i):
            continue
        for at in range(1, len(piece)):
            pair = piece[:at], piece[at:]
            if pair[0] in vocabulary and pair[1] in vocabulary:
                # SentencePiece takes ties from the left: the longer left part first.
                merges.append((-processor.get_score(i), -at, pair))
    begins = processor.encode("a", out_type=str)[0].startswith(_SPACE)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary,
            [pair for *_, pair in sorted(merges)],
            unk_token=pieces[processor.unk_id()],
            fuse_unk=True,
            byte_fallback=any(map(processor.is_byte, vocabulary.values())),
        )
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    first = [normalizers.Prepend(_SPACE)] if begins else []
    last = [decoders.Strip(" ", 1, 0)] if begins else []
    tokenizer.normalizer = normalizers.Sequence(
        [*first, normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *last,
        ]
    )
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(pieces[i], normalized=False) for i in special]
    )
    for text in _TEXTS:
        if tokenizer.encode(text, add_special_tokens=False).ids != processor.encode(
            text
        ):
            return None
    return tokenizer


def _is_special(processor, token_id):
    return processor.is_control(token_id) or processor.is_unknown(token_id)
