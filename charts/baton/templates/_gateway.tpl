{{- define "baton.gatewayPodSpec" -}}
{{- $config := include "baton.config" . | fromJson -}}
{{- $gateway := .Values.gateway -}}
{{- $image := include "baton.gatewayImage" . -}}
{{- include "baton.podBasics" (dict "root" . "part" $gateway "for" "gateway") }}
terminationGracePeriodSeconds: {{ include "baton.gatewayGrace" . }}
{{- with include "baton.modelInit" (dict "root" . "image" $image) }}
initContainers:
  {{- . | nindent 2 }}
{{- end }}
containers:
  - name: gateway
    image: {{ $image }}
    imagePullPolicy: {{ .Values.images.pullPolicy }}
    command: [python, -m, router.main]
    args: [--config, {{ .Values.paths.config }}/baton.yaml, --gateway-id, $(POD_NAME), --host, {{ $config.gateway.host | quote }}]
    ports:
      - {name: http, containerPort: {{ int $config.gateway.port }}}
    env:
      - name: POD_NAME
        valueFrom: {fieldRef: {fieldPath: metadata.name}}
      {{- include "baton.secretEnv" (dict "root" . "name" "BATON_SECRET" "entry" .Values.secrets.cluster) | nindent 6 }}
      {{- if .Values.secrets.apiKey.enabled }}
      {{- include "baton.secretEnv" (dict "root" . "name" "BATON_API_KEY" "entry" .Values.secrets.apiKey) | nindent 6 }}
      {{- end }}
      {{- include "baton.redisEnv" . | nindent 6 }}
      - name: BATON_CACHE
        value: {{ .Values.paths.cache | quote }}
      {{- with $gateway.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    startupProbe:
      {{- include "baton.probe" (dict "given" $gateway.startupProbe "own" "httpGet: {path: /health, port: http}\nperiodSeconds: 2\nfailureThreshold: 150") | nindent 6 }}
    livenessProbe:
      {{- include "baton.probe" (dict "given" $gateway.livenessProbe "own" "httpGet: {path: /health, port: http}\nperiodSeconds: 10\ntimeoutSeconds: 5\nfailureThreshold: 6") | nindent 6 }}
    readinessProbe:
      {{- include "baton.probe" (dict "given" $gateway.readinessProbe "own" "httpGet: {path: /ready, port: http}\nperiodSeconds: 2\ntimeoutSeconds: 2\nfailureThreshold: 2") | nindent 6 }}
    lifecycle:
      preStop:
        exec:
          command: [sleep, {{ int $gateway.preStopSeconds | quote }}]
    securityContext: {{- toYaml (default (dict) .Values.securityContext) | nindent 6 }}
    resources: {{- include "baton.resources" $gateway.resources | nindent 6 }}
    volumeMounts:
      - {name: config, mountPath: {{ .Values.paths.config | quote }}, readOnly: true}
      - {name: tmp, mountPath: /tmp}
      - {name: cache, mountPath: {{ .Values.paths.cache | quote }}}
      {{- with include "baton.modelMounts" . }}
      {{- . | nindent 6 }}
      {{- end }}
volumes:
  - name: config
    configMap: {name: {{ include "baton.fullname" . }}-config}
  - name: tmp
    emptyDir: {}
  - name: cache
    {{- default (dict "emptyDir" dict) .Values.cacheVolume | toYaml | nindent 4 }}
  {{- with include "baton.modelVolumes" . }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "baton.controllerPodSpec" -}}
{{- $config := include "baton.config" . | fromJson -}}
{{- $controller := .Values.controller -}}
{{- include "baton.podBasics" (dict "root" . "part" $controller "for" "controller") }}
terminationGracePeriodSeconds: {{ int $controller.terminationGracePeriodSeconds }}
containers:
  - name: controller
    image: {{ include "baton.controllerImage" . }}
    imagePullPolicy: {{ .Values.images.pullPolicy }}
    command: [python, -m, cluster.controller_main]
    args: [--config, {{ .Values.paths.config }}/baton.yaml]
    ports:
      - {name: http, containerPort: {{ int $config.controller.port }}}
    env:
      {{- include "baton.secretEnv" (dict "root" . "name" "BATON_SECRET" "entry" .Values.secrets.cluster) | nindent 6 }}
      {{- include "baton.secretEnv" (dict "root" . "name" "BATON_CONTROLLER_TOKEN" "entry" .Values.secrets.controllerToken) | nindent 6 }}
      {{- include "baton.redisEnv" . | nindent 6 }}
      {{- with include "baton.rayTokenEnv" . }}
      {{- . | nindent 6 }}
      {{- end }}
      - name: RAY_USAGE_STATS_ENABLED
        value: "0"
      {{- with $controller.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    # It begins to listen before it has reached Ray, or soon after: the head may come up late.
    startupProbe:
      {{- include "baton.probe" (dict "given" $controller.startupProbe "own" "httpGet: {path: /health, port: http}\nperiodSeconds: 5\nfailureThreshold: 120") | nindent 6 }}
    livenessProbe:
      {{- include "baton.probe" (dict "given" $controller.livenessProbe "own" "httpGet: {path: /health, port: http}\nperiodSeconds: 10\ntimeoutSeconds: 5\nfailureThreshold: 6") | nindent 6 }}
    readinessProbe:
      {{- include "baton.probe" (dict "given" $controller.readinessProbe "own" "httpGet: {path: /ready, port: http}\nperiodSeconds: 5\ntimeoutSeconds: 5\nfailureThreshold: 3") | nindent 6 }}
    securityContext: {{- toYaml (default (dict) .Values.securityContext) | nindent 6 }}
    resources: {{- include "baton.resources" $controller.resources | nindent 6 }}
    volumeMounts:
      - {name: config, mountPath: {{ .Values.paths.config | quote }}, readOnly: true}
      - {name: tmp, mountPath: /tmp}
volumes:
  - name: config
    configMap: {name: {{ include "baton.fullname" . }}-config}
  - name: tmp
    emptyDir: {}
{{- end -}}
