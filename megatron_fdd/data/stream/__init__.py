"""Streams: the features of a store in a bounded room, made while a training reads them.

The student asks, producers answer. In the folder of the store:

    stream/
      window.json               how many bytes may be asked for and kept
      producers/NAME.json       a producer's sign of life
      R/student.json            the student's, one for each data-parallel replica R
      R/PLACE.NAME.asked        an ask: the token ids of one micro-batch's units
      R/NAME.claim              whose ask it is to answer
      R/NAME.safetensors        the answer: a segment, whole or not there

NAME is the hash of the micro-batch's units, as a segment's name is: who has the batch knows the file, and nobody needs
an index. The first rank of a replica asks for its batches ahead of its loaders, as far as the window allows, and
removes what was used. Asks are the only credit: what nobody asked for nobody makes. Clocks of machines are never
compared: a process is taken for dead when its sign of life has not changed for a while of the observer's own clock.
"""
