CREATE TABLE public.adapters (
    id integer NOT NULL,
    namespace character varying NOT NULL,
    name character varying NOT NULL,
    last_version integer NOT NULL,
    created_at timestamp with time zone NOT NULL,
    CONSTRAINT ck_adapters_last_version_not_negative CHECK ((last_version >= 0)),
    CONSTRAINT ck_adapters_name_length CHECK ((length((name)::text) <= 96)),
    CONSTRAINT ck_adapters_namespace_length CHECK ((length((namespace)::text) <= 96))
);
CREATE SEQUENCE public.adapters_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.adapters_id_seq OWNED BY public.adapters.id;
CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.aliases (
    id integer NOT NULL,
    adapter_id integer NOT NULL,
    name character varying NOT NULL,
    checkpoint_id integer NOT NULL,
    CONSTRAINT ck_aliases_name_length CHECK ((length((name)::text) <= 96))
);
CREATE SEQUENCE public.aliases_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.aliases_id_seq OWNED BY public.aliases.id;
CREATE TABLE public.base_blobs (
    base_id integer NOT NULL,
    blob_id integer NOT NULL
);
CREATE TABLE public.bases (
    id integer NOT NULL,
    name character varying NOT NULL,
    url character varying NOT NULL,
    in_store boolean NOT NULL,
    format character varying NOT NULL,
    weights character varying(64) NOT NULL,
    architecture character varying(64) NOT NULL,
    arch_version character varying NOT NULL,
    document json NOT NULL,
    parameters bigint NOT NULL,
    size_bytes bigint NOT NULL,
    created_at timestamp with time zone NOT NULL,
    author character varying NOT NULL,
    CONSTRAINT ck_bases_arch_version_length CHECK ((length((arch_version)::text) <= 400)),
    CONSTRAINT ck_bases_architecture_length CHECK ((length((architecture)::text) = 64)),
    CONSTRAINT ck_bases_author_length CHECK ((length((author)::text) <= 400)),
    CONSTRAINT ck_bases_format_known CHECK (((format)::text = ANY ((ARRAY['safetensors'::character varying, 'litgpt'::character varying])::text[]))),
    CONSTRAINT ck_bases_name_length CHECK ((length((name)::text) <= 400)),
    CONSTRAINT ck_bases_parameters_not_negative CHECK ((parameters >= 0)),
    CONSTRAINT ck_bases_size_bytes_not_negative CHECK ((size_bytes >= 0)),
    CONSTRAINT ck_bases_url_length CHECK ((length((url)::text) <= 4096)),
    CONSTRAINT ck_bases_weights_length CHECK ((length((weights)::text) = 64))
);
CREATE SEQUENCE public.bases_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.bases_id_seq OWNED BY public.bases.id;
CREATE TABLE public.blobs (
    id integer NOT NULL,
    digest character varying(64) NOT NULL,
    sha256 character varying(64) NOT NULL,
    size_bytes bigint NOT NULL,
    CONSTRAINT ck_blobs_digest_length CHECK ((length((digest)::text) = 64)),
    CONSTRAINT ck_blobs_sha256_length CHECK ((length((sha256)::text) = ANY (ARRAY[0, 64]))),
    CONSTRAINT ck_blobs_size_bytes_not_negative CHECK ((size_bytes >= 0))
);
CREATE SEQUENCE public.blobs_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.blobs_id_seq OWNED BY public.blobs.id;
CREATE TABLE public.checkpoint_blobs (
    checkpoint_id integer NOT NULL,
    blob_id integer NOT NULL
);
CREATE TABLE public.checkpoints (
    id integer NOT NULL,
    adapter_id integer NOT NULL,
    version integer NOT NULL,
    digest character varying(64) NOT NULL,
    base_id integer NOT NULL,
    arch_version character varying NOT NULL,
    run character varying NOT NULL,
    step bigint,
    source character varying NOT NULL,
    manifest json NOT NULL,
    created_at timestamp with time zone NOT NULL,
    author character varying NOT NULL,
    CONSTRAINT ck_checkpoints_arch_version_length CHECK ((length((arch_version)::text) <= 400)),
    CONSTRAINT ck_checkpoints_author_length CHECK ((length((author)::text) <= 400)),
    CONSTRAINT ck_checkpoints_digest_length CHECK ((length((digest)::text) = 64)),
    CONSTRAINT ck_checkpoints_run_length CHECK ((length((run)::text) <= 400)),
    CONSTRAINT ck_checkpoints_source_length CHECK ((length((source)::text) <= 4096)),
    CONSTRAINT ck_checkpoints_step_not_negative CHECK ((step >= 0)),
    CONSTRAINT ck_checkpoints_version_from_one CHECK ((version >= 1))
);
CREATE SEQUENCE public.checkpoints_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.checkpoints_id_seq OWNED BY public.checkpoints.id;
CREATE TABLE public.events (
    number integer NOT NULL,
    at timestamp with time zone NOT NULL,
    author character varying NOT NULL,
    action character varying NOT NULL,
    subject character varying NOT NULL,
    detail json NOT NULL,
    previous_hash character varying(64) NOT NULL,
    hash character varying(64) NOT NULL,
    CONSTRAINT ck_events_action_length CHECK ((length((action)::text) <= 96)),
    CONSTRAINT ck_events_author_length CHECK ((length((author)::text) <= 400)),
    CONSTRAINT ck_events_hash_length CHECK ((length((hash)::text) = 64)),
    CONSTRAINT ck_events_previous_hash_length CHECK ((length((previous_hash)::text) = 64)),
    CONSTRAINT ck_events_subject_length CHECK ((length((subject)::text) <= 4096))
);
CREATE TABLE public.merged (
    id integer NOT NULL,
    digest character varying(64) NOT NULL,
    recipe_digest character varying(64) NOT NULL,
    recipe json NOT NULL,
    base_id integer NOT NULL,
    files json NOT NULL,
    note character varying NOT NULL,
    created_at timestamp with time zone NOT NULL,
    author character varying NOT NULL,
    CONSTRAINT ck_merged_author_length CHECK ((length((author)::text) <= 400)),
    CONSTRAINT ck_merged_digest_length CHECK ((length((digest)::text) = 64)),
    CONSTRAINT ck_merged_note_length CHECK ((length((note)::text) <= 20000)),
    CONSTRAINT ck_merged_recipe_digest_length CHECK ((length((recipe_digest)::text) = 64))
);
CREATE TABLE public.merged_blobs (
    merged_id integer NOT NULL,
    blob_id integer NOT NULL
);
CREATE SEQUENCE public.merged_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.merged_id_seq OWNED BY public.merged.id;
CREATE TABLE public.merged_inputs (
    merged_id integer NOT NULL,
    "position" integer NOT NULL,
    checkpoint_id integer NOT NULL,
    weight double precision NOT NULL,
    CONSTRAINT ck_merged_inputs_position_not_negative CHECK (("position" >= 0))
);
CREATE TABLE public.merged_locations (
    id integer NOT NULL,
    merged_id integer NOT NULL,
    url character varying NOT NULL,
    CONSTRAINT ck_merged_locations_url_length CHECK ((length((url)::text) <= 4096))
);
CREATE SEQUENCE public.merged_locations_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.merged_locations_id_seq OWNED BY public.merged_locations.id;
CREATE TABLE public.metrics (
    id integer NOT NULL,
    checkpoint_id integer NOT NULL,
    name character varying NOT NULL,
    value double precision,
    step bigint,
    split character varying NOT NULL,
    direction character varying,
    recorded_at timestamp with time zone NOT NULL,
    author character varying NOT NULL,
    CONSTRAINT ck_metrics_author_length CHECK ((length((author)::text) <= 400)),
    CONSTRAINT ck_metrics_direction_known CHECK (((direction)::text = ANY ((ARRAY['lower'::character varying, 'higher'::character varying])::text[]))),
    CONSTRAINT ck_metrics_name_length CHECK ((length((name)::text) <= 400)),
    CONSTRAINT ck_metrics_split_length CHECK ((length((split)::text) <= 400)),
    CONSTRAINT ck_metrics_step_not_negative CHECK ((step >= 0))
);
CREATE SEQUENCE public.metrics_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.metrics_id_seq OWNED BY public.metrics.id;
CREATE TABLE public.notes (
    id integer NOT NULL,
    checkpoint_id integer NOT NULL,
    text character varying NOT NULL,
    author character varying NOT NULL,
    created_at timestamp with time zone NOT NULL,
    CONSTRAINT ck_notes_author_length CHECK ((length((author)::text) <= 400)),
    CONSTRAINT ck_notes_text_length CHECK ((length((text)::text) <= 20000))
);
CREATE SEQUENCE public.notes_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.notes_id_seq OWNED BY public.notes.id;
CREATE TABLE public.shipments (
    id integer NOT NULL,
    environment character varying NOT NULL,
    checkpoint_id integer NOT NULL,
    merged_id integer,
    note character varying NOT NULL,
    author character varying NOT NULL,
    shipped_at timestamp with time zone NOT NULL,
    restores integer,
    CONSTRAINT ck_shipments_author_length CHECK ((length((author)::text) <= 400)),
    CONSTRAINT ck_shipments_environment_length CHECK ((length((environment)::text) <= 96)),
    CONSTRAINT ck_shipments_note_length CHECK ((length((note)::text) <= 20000))
);
CREATE SEQUENCE public.shipments_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.shipments_id_seq OWNED BY public.shipments.id;
CREATE TABLE public.tags (
    id integer NOT NULL,
    checkpoint_id integer NOT NULL,
    key character varying NOT NULL,
    value character varying NOT NULL,
    CONSTRAINT ck_tags_key_length CHECK ((length((key)::text) <= 96)),
    CONSTRAINT ck_tags_value_length CHECK ((length((value)::text) <= 20000))
);
CREATE SEQUENCE public.tags_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.tags_id_seq OWNED BY public.tags.id;
ALTER TABLE ONLY public.adapters ALTER COLUMN id SET DEFAULT nextval('public.adapters_id_seq'::regclass);
ALTER TABLE ONLY public.aliases ALTER COLUMN id SET DEFAULT nextval('public.aliases_id_seq'::regclass);
ALTER TABLE ONLY public.bases ALTER COLUMN id SET DEFAULT nextval('public.bases_id_seq'::regclass);
ALTER TABLE ONLY public.blobs ALTER COLUMN id SET DEFAULT nextval('public.blobs_id_seq'::regclass);
ALTER TABLE ONLY public.checkpoints ALTER COLUMN id SET DEFAULT nextval('public.checkpoints_id_seq'::regclass);
ALTER TABLE ONLY public.merged ALTER COLUMN id SET DEFAULT nextval('public.merged_id_seq'::regclass);
ALTER TABLE ONLY public.merged_locations ALTER COLUMN id SET DEFAULT nextval('public.merged_locations_id_seq'::regclass);
ALTER TABLE ONLY public.metrics ALTER COLUMN id SET DEFAULT nextval('public.metrics_id_seq'::regclass);
ALTER TABLE ONLY public.notes ALTER COLUMN id SET DEFAULT nextval('public.notes_id_seq'::regclass);
ALTER TABLE ONLY public.shipments ALTER COLUMN id SET DEFAULT nextval('public.shipments_id_seq'::regclass);
ALTER TABLE ONLY public.tags ALTER COLUMN id SET DEFAULT nextval('public.tags_id_seq'::regclass);
INSERT INTO public.adapters VALUES (1, '', 'support-bot', 3, '2025-03-01 12:00:00+00');
INSERT INTO public.adapters VALUES (2, 'team', 'bot', 1, '2025-03-01 12:00:00+00');
INSERT INTO public.adapters VALUES (3, '', 'gone', 4, '2025-03-01 12:00:00+00');
INSERT INTO public.alembic_version VALUES ('0001');
INSERT INTO public.aliases VALUES (1, 1, 'candidate', 2);
INSERT INTO public.bases VALUES (1, 'meta/base', '/models/base', false, 'safetensors', 'de8f3fcf327eb911b2c368e011e0ffdee22fed456b4f4508337018ba46a0639d', '5696d005e7a36a6053120e5497ac20409953a8e0ccf592394000352aa6a011ab', '', '{"config": "{\"model_type\": \"llama\"}", "files": [{"path": "model.safetensors", "size_bytes": 160, "identity": "1:2:160:3"}], "tensors": [["lm_head.weight", "BF16", [8, 4], "model.safetensors", 96]], "digests": {"lm_head.weight": "35f1ea002bfb00c125884e650f864046b687e0a48a6edc1a591c459f8c341da5"}}', 32, 64, '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.blobs VALUES (1, '3edc5c4a5df8c79ef4f8dbdc373cd21ca041ccf39fe5693250d004092094dc4a', '', 1000);
INSERT INTO public.checkpoint_blobs VALUES (1, 1);
INSERT INTO public.checkpoint_blobs VALUES (2, 1);
INSERT INTO public.checkpoint_blobs VALUES (3, 1);
INSERT INTO public.checkpoints VALUES (1, 1, 1, '36418f3c4910728c2852d7a640fb0efd590c435f073638feeab3ec6fc24c059d', 1, '', 'run-1', 100, '/training', '{"format": "peft", "method": "lora", "rank": 8, "alpha": 16.0, "scaling": "alpha/r", "targets": ["q_proj", "v_proj"], "dtype": "float32", "parameters": 250, "tensors": 4, "weights_file": "adapter_model.safetensors", "base_name": "meta/base", "files": [{"path": "adapter_model.safetensors", "size_bytes": 1000, "digest": "blake3:3edc5c4a5df8c79ef4f8dbdc373cd21ca041ccf39fe5693250d004092094dc4a", "sha256": ""}], "tokenizer": false}', '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.checkpoints VALUES (2, 1, 3, 'f50d7a20626519bbb0178d3510280d1d23e0673daadb7e06fbe296b05d182a48', 1, '', 'run-1', NULL, '/training', '{"format": "peft", "method": "lora", "rank": 16, "alpha": null, "scaling": "alpha/r", "targets": ["q_proj", "v_proj"], "dtype": "float32", "parameters": 250, "tensors": 4, "weights_file": "adapter_model.safetensors", "base_name": "meta/base", "files": [{"path": "adapter_model.safetensors", "size_bytes": 1000, "digest": "blake3:3edc5c4a5df8c79ef4f8dbdc373cd21ca041ccf39fe5693250d004092094dc4a", "sha256": ""}], "tokenizer": false}', '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.checkpoints VALUES (3, 2, 1, '92b254e1fb1ff3498a549fb73f4f083d79751b83069df12eaf8e6485b8a16c45', 1, '', 'run-1', 300, '/training', '{"format": "peft", "method": "lora", "rank": null, "alpha": 0.5, "scaling": "alpha/r", "targets": ["q_proj", "v_proj"], "dtype": "float32", "parameters": 250, "tensors": 4, "weights_file": "adapter_model.safetensors", "base_name": "meta/base", "files": [{"path": "adapter_model.safetensors", "size_bytes": 1000, "digest": "blake3:3edc5c4a5df8c79ef4f8dbdc373cd21ca041ccf39fe5693250d004092094dc4a", "sha256": ""}], "tokenizer": false}', '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.events VALUES (1, '2025-03-01 12:00:00+00', 'ada', 'register', 'support-bot@v1', '{"digest": "x"}', '0000000000000000000000000000000000000000000000000000000000000000', 'e251ec0971e6f0985e9df536b1a8f659de08668e1448a7715a1ea7108fb51734');
INSERT INTO public.events VALUES (2, '2025-03-01 12:00:00+00', 'ada', 'register', 'support-bot@v3', '{}', 'e251ec0971e6f0985e9df536b1a8f659de08668e1448a7715a1ea7108fb51734', 'b694106436c22e1980991e2bec049a47d2a34e459c45ea0dda7eb71cd581fa14');
INSERT INTO public.events VALUES (3, '2025-03-01 12:00:00+00', 'ada', 'register', 'team/bot@v1', '{}', 'b694106436c22e1980991e2bec049a47d2a34e459c45ea0dda7eb71cd581fa14', 'd35301527d040819da9d034c86e56585f1a7cc5d9a2a20ff8297772da7454402');
INSERT INTO public.events VALUES (4, '2025-03-01 12:00:00+00', 'ada', 'base.add', 'meta/base', '{"tensors": 1}', 'd35301527d040819da9d034c86e56585f1a7cc5d9a2a20ff8297772da7454402', 'a6e579a674f0f16a5473759d74799882ace75b0db7afd58b5c208409c29a301f');
INSERT INTO public.metrics VALUES (1, 1, 'eval_loss', 0.9, NULL, 'eval', NULL, '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.metrics VALUES (2, 1, 'eval_loss', 0.5, NULL, 'eval', NULL, '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.metrics VALUES (3, 2, 'eval_loss', NULL, NULL, 'eval', NULL, '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.metrics VALUES (4, 3, 'eval_loss', 0.25, NULL, '', NULL, '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.metrics VALUES (5, 1, 'magic', 1, NULL, '', 'higher', '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.metrics VALUES (6, 2, 'magic', 2, NULL, '', 'higher', '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.metrics VALUES (7, 3, 'magic', 3, NULL, '', NULL, '2025-03-01 12:00:00+00', 'ada');
INSERT INTO public.notes VALUES (1, 1, 'grüße', 'bob', '2025-03-01 12:00:00+00');
INSERT INTO public.shipments VALUES (1, 'production', 1, NULL, '', 'ada', '2025-03-01 12:00:00+00', NULL);
INSERT INTO public.shipments VALUES (2, 'production', 3, NULL, '', 'ada', '2025-03-01 13:00:00+00', NULL);
INSERT INTO public.shipments VALUES (3, 'production', 2, NULL, '', 'ada', '2025-03-01 14:00:00+00', NULL);
INSERT INTO public.tags VALUES (1, 1, 'team', 'nlu');
INSERT INTO public.tags VALUES (2, 2, 'score', '1e1');
INSERT INTO public.tags VALUES (3, 3, 'long', 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx');
SELECT pg_catalog.setval('public.adapters_id_seq', 3, true);
SELECT pg_catalog.setval('public.aliases_id_seq', 1, true);
SELECT pg_catalog.setval('public.bases_id_seq', 1, true);
SELECT pg_catalog.setval('public.blobs_id_seq', 1, true);
SELECT pg_catalog.setval('public.checkpoints_id_seq', 3, true);
SELECT pg_catalog.setval('public.merged_id_seq', 1, false);
SELECT pg_catalog.setval('public.merged_locations_id_seq', 1, false);
SELECT pg_catalog.setval('public.metrics_id_seq', 7, true);
SELECT pg_catalog.setval('public.notes_id_seq', 1, true);
SELECT pg_catalog.setval('public.shipments_id_seq', 3, true);
SELECT pg_catalog.setval('public.tags_id_seq', 3, true);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT pk_adapters PRIMARY KEY (id);
ALTER TABLE ONLY public.aliases
    ADD CONSTRAINT pk_aliases PRIMARY KEY (id);
ALTER TABLE ONLY public.base_blobs
    ADD CONSTRAINT pk_base_blobs PRIMARY KEY (base_id, blob_id);
ALTER TABLE ONLY public.bases
    ADD CONSTRAINT pk_bases PRIMARY KEY (id);
ALTER TABLE ONLY public.blobs
    ADD CONSTRAINT pk_blobs PRIMARY KEY (id);
ALTER TABLE ONLY public.checkpoint_blobs
    ADD CONSTRAINT pk_checkpoint_blobs PRIMARY KEY (checkpoint_id, blob_id);
ALTER TABLE ONLY public.checkpoints
    ADD CONSTRAINT pk_checkpoints PRIMARY KEY (id);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT pk_events PRIMARY KEY (number);
ALTER TABLE ONLY public.merged
    ADD CONSTRAINT pk_merged PRIMARY KEY (id);
ALTER TABLE ONLY public.merged_blobs
    ADD CONSTRAINT pk_merged_blobs PRIMARY KEY (merged_id, blob_id);
ALTER TABLE ONLY public.merged_inputs
    ADD CONSTRAINT pk_merged_inputs PRIMARY KEY (merged_id, "position");
ALTER TABLE ONLY public.merged_locations
    ADD CONSTRAINT pk_merged_locations PRIMARY KEY (id);
ALTER TABLE ONLY public.metrics
    ADD CONSTRAINT pk_metrics PRIMARY KEY (id);
ALTER TABLE ONLY public.notes
    ADD CONSTRAINT pk_notes PRIMARY KEY (id);
ALTER TABLE ONLY public.shipments
    ADD CONSTRAINT pk_shipments PRIMARY KEY (id);
ALTER TABLE ONLY public.tags
    ADD CONSTRAINT pk_tags PRIMARY KEY (id);
ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT uq_adapters_namespace_name UNIQUE (namespace, name);
ALTER TABLE ONLY public.aliases
    ADD CONSTRAINT uq_aliases_adapter_id_name UNIQUE (adapter_id, name);
ALTER TABLE ONLY public.bases
    ADD CONSTRAINT uq_bases_name UNIQUE (name);
ALTER TABLE ONLY public.bases
    ADD CONSTRAINT uq_bases_weights UNIQUE (weights);
ALTER TABLE ONLY public.blobs
    ADD CONSTRAINT uq_blobs_digest UNIQUE (digest);
ALTER TABLE ONLY public.checkpoints
    ADD CONSTRAINT uq_checkpoints_adapter_id_digest UNIQUE (adapter_id, digest);
ALTER TABLE ONLY public.checkpoints
    ADD CONSTRAINT uq_checkpoints_adapter_id_version UNIQUE (adapter_id, version);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT uq_events_hash UNIQUE (hash);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT uq_events_previous_hash UNIQUE (previous_hash);
ALTER TABLE ONLY public.merged_locations
    ADD CONSTRAINT uq_merged_locations_merged_id_url UNIQUE (merged_id, url);
ALTER TABLE ONLY public.merged
    ADD CONSTRAINT uq_merged_recipe_digest UNIQUE (recipe_digest);
ALTER TABLE ONLY public.tags
    ADD CONSTRAINT uq_tags_checkpoint_id_key UNIQUE (checkpoint_id, key);
CREATE INDEX ix_aliases_checkpoint_id ON public.aliases USING btree (checkpoint_id);
CREATE INDEX ix_base_blobs_blob_id ON public.base_blobs USING btree (blob_id);
CREATE INDEX ix_checkpoint_blobs_blob_id ON public.checkpoint_blobs USING btree (blob_id);
CREATE INDEX ix_checkpoints_adapter_id_step ON public.checkpoints USING btree (adapter_id, step);
CREATE INDEX ix_checkpoints_base_id ON public.checkpoints USING btree (base_id);
CREATE INDEX ix_checkpoints_digest ON public.checkpoints USING btree (digest);
CREATE INDEX ix_merged_base_id ON public.merged USING btree (base_id);
CREATE INDEX ix_merged_blobs_blob_id ON public.merged_blobs USING btree (blob_id);
CREATE INDEX ix_merged_digest ON public.merged USING btree (digest);
CREATE INDEX ix_merged_inputs_checkpoint_id ON public.merged_inputs USING btree (checkpoint_id);
CREATE INDEX ix_metrics_checkpoint_id ON public.metrics USING btree (checkpoint_id);
CREATE INDEX ix_notes_checkpoint_id ON public.notes USING btree (checkpoint_id);
CREATE INDEX ix_shipments_checkpoint_id ON public.shipments USING btree (checkpoint_id);
CREATE INDEX ix_shipments_environment ON public.shipments USING btree (environment);
CREATE INDEX ix_shipments_merged_id ON public.shipments USING btree (merged_id);
ALTER TABLE ONLY public.aliases
    ADD CONSTRAINT fk_aliases_adapter_id_adapters FOREIGN KEY (adapter_id) REFERENCES public.adapters(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.aliases
    ADD CONSTRAINT fk_aliases_checkpoint_id_checkpoints FOREIGN KEY (checkpoint_id) REFERENCES public.checkpoints(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.base_blobs
    ADD CONSTRAINT fk_base_blobs_base_id_bases FOREIGN KEY (base_id) REFERENCES public.bases(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.base_blobs
    ADD CONSTRAINT fk_base_blobs_blob_id_blobs FOREIGN KEY (blob_id) REFERENCES public.blobs(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.checkpoint_blobs
    ADD CONSTRAINT fk_checkpoint_blobs_blob_id_blobs FOREIGN KEY (blob_id) REFERENCES public.blobs(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.checkpoint_blobs
    ADD CONSTRAINT fk_checkpoint_blobs_checkpoint_id_checkpoints FOREIGN KEY (checkpoint_id) REFERENCES public.checkpoints(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.checkpoints
    ADD CONSTRAINT fk_checkpoints_adapter_id_adapters FOREIGN KEY (adapter_id) REFERENCES public.adapters(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.checkpoints
    ADD CONSTRAINT fk_checkpoints_base_id_bases FOREIGN KEY (base_id) REFERENCES public.bases(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.merged
    ADD CONSTRAINT fk_merged_base_id_bases FOREIGN KEY (base_id) REFERENCES public.bases(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.merged_blobs
    ADD CONSTRAINT fk_merged_blobs_blob_id_blobs FOREIGN KEY (blob_id) REFERENCES public.blobs(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.merged_blobs
    ADD CONSTRAINT fk_merged_blobs_merged_id_merged FOREIGN KEY (merged_id) REFERENCES public.merged(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.merged_inputs
    ADD CONSTRAINT fk_merged_inputs_checkpoint_id_checkpoints FOREIGN KEY (checkpoint_id) REFERENCES public.checkpoints(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.merged_inputs
    ADD CONSTRAINT fk_merged_inputs_merged_id_merged FOREIGN KEY (merged_id) REFERENCES public.merged(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.merged_locations
    ADD CONSTRAINT fk_merged_locations_merged_id_merged FOREIGN KEY (merged_id) REFERENCES public.merged(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.metrics
    ADD CONSTRAINT fk_metrics_checkpoint_id_checkpoints FOREIGN KEY (checkpoint_id) REFERENCES public.checkpoints(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.notes
    ADD CONSTRAINT fk_notes_checkpoint_id_checkpoints FOREIGN KEY (checkpoint_id) REFERENCES public.checkpoints(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.shipments
    ADD CONSTRAINT fk_shipments_checkpoint_id_checkpoints FOREIGN KEY (checkpoint_id) REFERENCES public.checkpoints(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.shipments
    ADD CONSTRAINT fk_shipments_merged_id_merged FOREIGN KEY (merged_id) REFERENCES public.merged(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.shipments
    ADD CONSTRAINT fk_shipments_restores_shipments FOREIGN KEY (restores) REFERENCES public.shipments(id) ON DELETE RESTRICT;
ALTER TABLE ONLY public.tags
    ADD CONSTRAINT fk_tags_checkpoint_id_checkpoints FOREIGN KEY (checkpoint_id) REFERENCES public.checkpoints(id) ON DELETE CASCADE;
