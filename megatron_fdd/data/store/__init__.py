"""The store of a teacher's features: hidden states on disk, by the token ids that the teacher read.

    STORE/
      store.json                which teacher, which blocks, in which form; written once
      lens/                     the teacher's final norm and head
      tokenizer/, hf/           the teacher's own, where it has them
      segments/XX/NAME.safetensors
      index.safetensors         a cache, made again when segments came or went
      runs/RUN.safetensors      a cache: the units that a run reads
      rate.json                 how fast the last producer was

A *unit* is a run of token ids that the teacher read at once, with attention among them and with none beyond. Its key is
a hash of its ids, so that order, packing, seed, epoch, batch size and layout of a student do not matter. Nothing in a
store is code, and nothing of it is unpickled.
"""
