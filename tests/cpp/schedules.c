/* Draws with one engine, by a number of steps after the other: schedules BUNDLE FOLDER STEPS... */
#include <stdio.h>
#include <stdlib.h>

#include "sana.h"

static int fail(sana_error* error) {
    fprintf(stderr, "%s: %s\n", sana_error_kind(error), sana_error_message(error));
    sana_error_free(error);
    return 1;
}

int main(int argc, char** argv) {
    sana_engine* engine = NULL;
    sana_error* error = sana_engine_open(argv[1], NULL, &engine);
    for (int number = 3; number < argc && error == NULL; ++number) {
        const char* prompts[] = {"a cat"};
        char path[4096];
        sana_pictures* pictures = NULL;
        sana_request request;
        sana_request_init(&request);
        request.prompts = prompts;
        request.num_prompts = 1;
        request.seed = 3;
        request.steps = atoi(argv[number]);
        request.width = 96;
        snprintf(path, sizeof path, "%s/%d.png", argv[2], number - 3);
        error = sana_generate(engine, &request, &pictures);
        if (error == NULL) error = sana_picture_save(pictures, 0, path);
        sana_pictures_free(pictures);
    }
    sana_engine_close(engine);
    return error == NULL ? 0 : fail(error);
}
