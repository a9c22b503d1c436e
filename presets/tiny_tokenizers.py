"""Trains the tokenizers of the small presets, the same bytes at every run."""

import io

import sentencepiece
import tokenizers

# As T5's vocabulary: words bring the space before them along, also the first one
# and one after a sentinel, and white space of any kind and length is one space.
T5 = {
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "bos_id": -1,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": True,
    "allow_whitespace_only_pieces": False,
}


def train_sentencepiece(texts, vocabulary_size=1024, **options):
    """Train a SentencePiece byte-pair model that loses nothing of a text.

    Bytes are the fallback for characters outside the vocabulary, and neither spaces
    nor newlines are normalised, so that `detokenize(tokenize(text)) == text`. The
    one exception is SentencePiece's own: it writes a space as U+2581, so a U+2581 in
    a text comes back as a space. Ids 0, 1 and 2 are `<unk>`, `<s>` and `</s>`.

    Args:
        texts: iterable of str.
        vocabulary_size: int. Number of tokens, bytes and special tokens included.
        **options: of SentencePiece's trainer, in place of those above, such as `T5`.

    Returns:
        bytes. The SentencePiece model ("proto").
    """
    # The trainer reads one sentence at a time, drops long ones and takes no newline.
    paragraphs = (line for text in texts for line in text.splitlines() if line)
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.9995,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "max_sentence_length": 1 << 16,
        "num_threads": 1,
        "shuffle_input_sentence": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=paragraphs,
        model_writer=model,
        vocab_size=vocabulary_size,
        **{**settings, **options},
    )
    return model.getvalue()


def train_byte_pair(texts, vocabulary_size=1024):
    """Train a byte-level byte-pair tokenizer with GPT-2's split of words.

    Every byte is in the vocabulary, so `detokenize(tokenize(text)) == text`. Ids 0,
    1 and 2 are `<pad>`, `<s>` and `</s>`.

    Args:
        texts: iterable of str.
        vocabulary_size: int. Number of tokens, bytes and special tokens included.

    Returns:
        str. The contents of a `tokenizer.json`.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()
