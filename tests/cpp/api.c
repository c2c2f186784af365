/* Calls of the C API for the tests: `api WHAT BUNDLE [KEY VALUE]…` prints what came of it.
 *
 * WHAT: open; generate; replay (KEY info); read (of the picture BUNDLE); save (to the path KEY out); lora; nulls (calls with
 * nothing). KEY: prompt, negative, seed, steps, guidance, width, height, scheduler, schedule_file, backend, library, cancel_at,
 * cancelled, size. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sana.h"

static int say(sana_error* error) {
    if (error == NULL) {
        printf("ok\n");
        return 0;
    }
    printf("%s\n%s\n", sana_error_kind(error), sana_error_message(error));
    sana_error_free(error);
    return 0;
}

static int cancel_at(void* user, int step, int total, const float* latents, size_t count) {
    (void)total;
    return count > 0 && latents != NULL && step < *(int*)user;
}

static int nulls(const char* bundle) {
    sana_engine* engine = (sana_engine*)&engine;
    sana_pictures* pictures = (sana_pictures*)&pictures;
    sana_request request;
    sana_engine_options options;
    sana_engine_options_init(NULL);
    sana_request_init(NULL);
    sana_request_init(&request);
    sana_engine_options_init(&options);
    options.struct_size -= 8;
    say(sana_engine_open(NULL, NULL, &engine));
    printf("%d\n", engine == NULL);
    say(sana_engine_open(bundle, NULL, NULL));
    say(sana_engine_open(bundle, &options, &engine));
    say(sana_generate(NULL, &request, &pictures));
    printf("%d\n", pictures == NULL);
    say(sana_generate(NULL, NULL, NULL));
    say(sana_replay(NULL, NULL, NULL, NULL, NULL, &pictures));
    say(sana_apply_lora(NULL, NULL, 1));
    say(sana_picture_read(NULL, &pictures));
    say(sana_picture_save(NULL, 0, "x.png"));
    say(sana_picture_save(NULL, 0, NULL));
    printf("%d\n", sana_pictures_count(NULL) == 0 && sana_picture_pixels(NULL, 0, NULL, NULL) == NULL &&
                       sana_picture_info(NULL, 0) == NULL && sana_pictures_warning(NULL, 0) == NULL &&
                       sana_pictures_num_warnings(NULL) == 0);
    printf("%s%s\n", sana_error_kind(NULL), sana_error_message(NULL));
    sana_error_free(NULL);
    sana_pictures_free(NULL);
    sana_engine_close(NULL);
    sana_cancel(NULL);
    sana_canceller_free(NULL);
    if (sana_engine_open(bundle, NULL, &engine) == NULL) {
        request.num_prompts = 1;
        say(sana_generate(engine, &request, &pictures)); /* prompts is NULL */
        const char* none[] = {NULL};
        request.prompts = none;
        say(sana_generate(engine, &request, &pictures));
        request.struct_size = 1;
        say(sana_generate(engine, &request, &pictures));
    }
    sana_engine_close(engine);
    return 0;
}

int main(int argc, char** argv) {
    if (argc < 3) return 2;
    const char *what = argv[1], *bundle = argv[2], *info = "", *out = NULL, *prompt = "a cat";
    sana_engine_options options;
    sana_request request;
    int at = 0;
    sana_canceller* canceller = NULL;
    sana_engine_options_init(&options);
    sana_request_init(&request);
    request.prompts = &prompt;
    request.num_prompts = 1;
    for (int i = 3; i + 1 < argc; i += 2) {
        const char *key = argv[i], *value = argv[i + 1];
        if (strcmp(key, "prompt") == 0) prompt = value;
        if (strcmp(key, "negative") == 0) request.negative_prompt = value;
        if (strcmp(key, "seed") == 0) request.seed = strtoull(value, NULL, 10);
        if (strcmp(key, "steps") == 0) request.steps = atoll(value);
        if (strcmp(key, "guidance") == 0) request.guidance = atof(value);
        if (strcmp(key, "width") == 0) request.width = atoll(value);
        if (strcmp(key, "height") == 0) request.height = atoll(value);
        if (strcmp(key, "scheduler") == 0) request.scheduler = value;
        if (strcmp(key, "schedule_file") == 0) request.schedule_file = value;
        if (strcmp(key, "backend") == 0) options.backend = value;
        if (strcmp(key, "library") == 0) options.onnxruntime_library = value;
        if (strcmp(key, "info") == 0) info = value;
        if (strcmp(key, "out") == 0) out = value;
        if (strcmp(key, "cancel_at") == 0) {
            at = atoi(value);
            request.on_step = cancel_at;
            request.user = &at;
        }
        if (strcmp(key, "cancelled") == 0) {
            canceller = sana_canceller_new();
            request.canceller = canceller;
            sana_cancel(canceller);
        }
    }
    if (strcmp(what, "nulls") == 0) return nulls(bundle);
    sana_engine* engine = NULL;
    sana_pictures* pictures = NULL;
    sana_error* error = NULL;
    if (strcmp(what, "read") == 0) {
        error = sana_picture_read(bundle, &pictures);
    } else {
        error = sana_engine_open(bundle, &options, &engine);
        if (error == NULL && strcmp(what, "generate") == 0) error = sana_generate(engine, &request, &pictures);
        if (error == NULL && strcmp(what, "lora") == 0) error = sana_apply_lora(engine, info, 0.5);
        if (error == NULL && strcmp(what, "replay") == 0) {
            error = sana_replay(engine, info, request.on_step, request.user, canceller, &pictures);
        }
    }
    sana_engine_close(engine); /* pictures may outlive it */
    sana_canceller_free(canceller);
    if (error == NULL && out != NULL) error = sana_picture_save(pictures, 0, out);
    if (error == NULL && pictures != NULL) {
        int width = 0, height = 0;
        unsigned long sum = 0;
        const uint8_t* pixels = sana_picture_pixels(pictures, 0, &width, &height);
        for (long i = 0; i < (long)width * height * 3; ++i) sum = sum * 31 + pixels[i];
        printf("%dx%d %lu\n%s\n", width, height, sum, sana_picture_info(pictures, 0));
        if (sana_picture_pixels(pictures, 1, NULL, NULL) != NULL || sana_picture_info(pictures, 1) != NULL) return 3;
    } else {
        say(error);
    }
    sana_pictures_free(pictures);
    return 0;
}
