/* The C API, for programs in C and for other languages. Nothing throws; strings are UTF-8.
 *
 * A function that can fail returns NULL, or an error that sana_error_free frees. */
#ifndef SANA_H
#define SANA_H

#include <stddef.h>
#include <stdint.h>

#include "sana/export.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sana_engine sana_engine;       /* may be shared between threads: drawn one at a time, in the order of the calls */
typedef struct sana_pictures sana_pictures;   /* of one request; may be read by several threads */
typedef struct sana_canceller sana_canceller; /* cancels requests, from any thread */
typedef struct sana_error sana_error;

/* After each step, counted from 1 over all pictures. latents: count floats (B, C, h, w), valid during the call. 0 cancels. */
typedef int (*sana_on_step)(void* user, int step, int total, const float* latents, size_t count);

/* Fill with sana_engine_options_init, then change what is to differ. */
typedef struct sana_engine_options {
    size_t struct_size;
    const char* backend;             /* "auto", "tensorrt" or "onnxruntime" */
    int verify;                      /* 1: compare the SHA-256 of every file that is opened */
    int num_threads;                 /* 0: all that this process may use */
    int low_memory;                  /* 1: the text encoder is unloaded after use, the others while it is there */
    const char* onnxruntime_library; /* NULL: $SANA_ONNXRUNTIME, or what the build found */
    int cuda_graphs;                 /* 1: with TensorRT, a picture is one launch, from the second one of a size on */
    const char* tensorrt_library;    /* NULL: $SANA_TENSORRT, or what the build or the system finds */
    const char* plugins_library;     /* NULL: $SANA_PLUGINS, or the one beside this library */
    const char* kernel_cache;        /* folder of compiled kernels; NULL: the usual one; "": none */
} sana_engine_options;

/* Fill with sana_request_init, then change what is to differ. */
typedef struct sana_request {
    size_t struct_size;
    const char* const* prompts;
    size_t num_prompts;
    const char* negative_prompt;     /* NULL or one for all */
    uint64_t seed;                   /* of the first picture; the next ones get the next integers */
    int64_t steps;                   /* 0: as the bundle says; so are the following */
    double guidance;                 /* NaN: as the bundle says */
    int64_t width, height;           /* px */
    const char* scheduler;           /* NULL: as the bundle says */
    const char* schedule_file;       /* NULL, or a YAML file of a schedule in place of a scheduler */
    sana_on_step on_step;            /* NULL or called after each step */
    void* user;                      /* for on_step */
    const sana_canceller* canceller; /* NULL, or what cancels it; may be freed while the request is drawn */
} sana_request;

SANA_EXPORT void sana_engine_options_init(sana_engine_options* options);
SANA_EXPORT void sana_request_init(sana_request* request);

/* options: NULL for the usual ones. */
SANA_EXPORT sana_error* sana_engine_open(const char* bundle, const sana_engine_options* options, sana_engine** out);
/* After the request in progress; those that wait are refused. Calls that begin later may not have the engine. */
SANA_EXPORT void sana_engine_close(sana_engine* engine);
/* A picture again from its info: the same pixels on the same device. on_step, canceller: as in sana_request. */
SANA_EXPORT sana_error* sana_replay(sana_engine* engine, const char* info, sana_on_step on_step, void* user,
                                    const sana_canceller* canceller, sana_pictures** out);
/* Reserved: refused, for engines cannot change their weights yet. */
SANA_EXPORT sana_error* sana_apply_lora(sana_engine* engine, const char* path, double scale);
SANA_EXPORT sana_error* sana_generate(sana_engine* engine, const sana_request* request, sana_pictures** out);

/* NULL if there is no memory. */
SANA_EXPORT sana_canceller* sana_canceller_new(void);
/* At once where the request waits for others, else after the step in progress. For good: the next request needs a new one. */
SANA_EXPORT void sana_cancel(sana_canceller* canceller);
SANA_EXPORT void sana_canceller_free(sana_canceller* canceller);

/* One picture from a PNG file that sana_picture_save wrote. */
SANA_EXPORT sana_error* sana_picture_read(const char* path, sana_pictures** out);
SANA_EXPORT size_t sana_pictures_count(const sana_pictures* pictures);
/* (height, width, 3) RGB, valid until sana_pictures_free; NULL if there is no such picture. width, height: NULL or filled. */
SANA_EXPORT const uint8_t* sana_picture_pixels(const sana_pictures* pictures, size_t index, int* width, int* height);
SANA_EXPORT const char* sana_picture_info(const sana_pictures* pictures, size_t index); /* JSON: how it was drawn */
SANA_EXPORT sana_error* sana_picture_save(const sana_pictures* pictures, size_t index, const char* path);
SANA_EXPORT size_t sana_pictures_num_warnings(const sana_pictures* pictures);
SANA_EXPORT const char* sana_pictures_warning(const sana_pictures* pictures, size_t index);
SANA_EXPORT void sana_pictures_free(sana_pictures* pictures);

SANA_EXPORT const char* sana_error_kind(const sana_error* error); /* the class in Python, as "ManifestError" */
SANA_EXPORT const char* sana_error_message(const sana_error* error);
SANA_EXPORT void sana_error_free(sana_error* error);

#ifdef __cplusplus
}
#endif

#endif
