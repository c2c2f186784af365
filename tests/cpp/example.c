/* Draws a picture through the C API: example BUNDLE PROMPT SEED OUT.png [CANCEL_AFTER]. */
#include <stdio.h>
#include <stdlib.h>

#include "sana.h"

static int on_step(void* user, int step, int total, const float* latents, size_t count) {
    fprintf(stderr, "step %d of %d, %zu latents, the first %.3f\n", step, total, count, latents[0]);
    return user == NULL || step < *(int*)user;
}

static int fail(sana_error* error) {
    fprintf(stderr, "%s: %s\n", sana_error_kind(error), sana_error_message(error));
    sana_error_free(error);
    return 1;
}

int main(int argc, char** argv) {
    if (argc < 5) return 2;
    int cancel_after = argc > 5 ? atoi(argv[5]) : 0;
    sana_engine* engine = NULL;
    sana_error* error = sana_engine_open(argv[1], NULL, &engine);
    if (error != NULL) return fail(error);

    const char* prompts[] = {argv[2]};
    sana_request request;
    sana_request_init(&request);
    request.prompts = prompts;
    request.num_prompts = 1;
    request.seed = strtoull(argv[3], NULL, 10);
    request.steps = 3;
    request.width = request.height = 256;
    request.on_step = on_step;
    request.user = cancel_after > 0 ? &cancel_after : NULL;

    sana_pictures* pictures = NULL;
    error = sana_generate(engine, &request, &pictures);
    if (error == NULL) error = sana_picture_save(pictures, 0, argv[4]);
    sana_pictures_free(pictures);
    sana_engine_close(engine);
    return error == NULL ? 0 : fail(error);
}
