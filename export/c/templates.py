"""The texts around the tables of a C source, to be filled by ``writer``."""

from __future__ import annotations

HEADER = """\
/* A pruned image classifier, written by rprune: {kind}.

   predict() reads an image of bytes, 0..255: channel by channel (of {channels}), in each row by row ({height} of
   {width}), not interleaved. It writes {classes} logits; the class is the index of the largest. predict_float() reads
   the same as floats in [0,1]. Normalisation is inside. Neither allocates nor fails; both work in static memory, so
   that only one call may run at a time.

   Compile with -O3 for the CPU it runs on (-march=native, -mcpu=...), for a microcontroller with -Os, and without
   -ffast-math. GCC and Clang use vectors on x86-64 and 64-bit ARM; MODEL_SCALAR turns them off, and other compilers
   take plain C99. Integers give the same results everywhere, floats the same up to rounding.

   Vectors hold floats, of integer models too, but for x86-64 with VNNI, where integers are bytes as without vectors. */
#ifndef RPRUNE_MODEL_H
#define RPRUNE_MODEL_H

#include <stdint.h>

#define MODEL_FORMAT {version}
#define MODEL_CHANNELS {channels}
#define MODEL_HEIGHT {height}
#define MODEL_WIDTH {width}
#define MODEL_CLASSES {classes}
#define MODEL_INTEGERS {integers}

/* Bytes of static memory (.bss), with vectors of floats and without; less than 2,048 bytes of stack come to it. */
#define MODEL_RAM_VECTOR {vector}
#define MODEL_RAM_SCALAR {scalar}
/* Bytes of constant tables, in flash on a microcontroller; code and the layers' records come to it, some kilobytes. */
#define MODEL_TABLES_VECTOR {tables_vector}
#define MODEL_TABLES_SCALAR {tables}

#ifdef __cplusplus
extern "C" {{
#endif
void predict(const uint8_t *image, float *logits);
void predict_float(const float *image, float *logits);
#ifdef __cplusplus
}}
#endif
#endif
"""

RUN = """\
static void run(float *logits) {{
    {steps}
}}

static const image given = {{{image}}};

void predict(const uint8_t *pixels, float *logits) {{
    cell *const first = {first};
    ROWS(&given) {{
        cell *row = row_of(first, &given, c, y);
        for (int x = 0; x < given.width; x++, pixels++) row[x] = {byte};
    }}
    frame(first, &given);
    run(logits);
}}

void predict_float(const float *pixels, float *logits) {{
    cell *const first = {first};
    ROWS(&given) {{
        cell *row = row_of(first, &given, c, y);
        for (int x = 0; x < given.width; x++, pixels++) row[x] = {real};
    }}
    frame(first, &given);
    run(logits);
}}
"""
